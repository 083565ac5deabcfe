"""Sentences to embed, written for this project.

Each `Triple` makes two pairs around one anchor: a paraphrase, which says the same in other words, and a near
miss, which shares words or the scene and says something else. Some near misses are easy (a river bank), some
are hard even for the float model (the two batteries): what counts is that a few-bit model orders the two
pairs as the float one does. The Korean triples are about the same matters where that is natural; they are no
translations.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Triple:
    """An anchor, a sentence that means the same and a sentence that only looks close."""

    language: str
    anchor: str
    paraphrase: str
    near_miss: str


_ENGLISH = (
    (
        "The last train to the coast leaves at twenty past nine.",
        "If you miss the 9:20 in the evening, there is no other train to the seaside.",
        "We stood all the way on the train to the coast because every seat was taken.",
    ),
    (
        "Let the dough rest overnight in the fridge before you bake it.",
        "The bread dough should stay in the refrigerator until morning and only then go into the oven.",
        "The dough in the fridge has gone off, so throw it away before it smells.",
    ),
    (
        "She hurt her knee on the stairs and can't run for a month.",
        "After a fall down the steps her knee is injured, so no jogging for four weeks.",
        "She runs up the stairs every morning to keep her knees strong.",
    ),
    (
        "The program crashes when the file is larger than two gigabytes.",
        "Opening anything over 2 GB makes the application exit with an error.",
        "The program compresses files that are larger than two gigabytes.",
    ),
    (
        "Heavy rain flooded the lower part of the town on Sunday.",
        "On Sunday the streets near the river were under water after a downpour.",
        "The town had no rain at all on Sunday, for the ninth week in a row.",
    ),
    (
        "The bank raised its lending rate by half a percent.",
        "Borrowing from the bank now costs 0.5 points more.",
        "We had a picnic on the river bank with half of the village.",
    ),
    (
        "They scored in the final minute and won the cup.",
        "A goal just before the whistle gave the team the trophy.",
        "He dropped the cup in the last minute of the washing-up.",
    ),
    (
        "The telescope photographed a galaxy that formed shortly after the Big Bang.",
        "A new image shows one of the earliest galaxies in the universe.",
        "You can photograph the Moon through a small telescope with your phone.",
    ),
    (
        "Please hand in your essays by Friday noon; late work loses a grade.",
        "Essays are due on Friday at twelve, and marks come off after that.",
        "On Fridays the writing class has lunch together at noon.",
    ),
    (
        "The violinist played the slow movement from memory.",
        "Without looking at a score, the soloist performed the adagio on her violin.",
        "The violinist left her coat on the night bus.",
    ),
    (
        "My parcel is marked as delivered, but nothing was at the door.",
        "The tracking page says the package arrived, though I never received it.",
        "The parcel was heavier than the postman had expected.",
    ),
    (
        "The bridge was rebuilt in stone after the great fire.",
        "When flames had destroyed the old crossing, a stone one took its place.",
        "The stone bridge is closed to lorries until the next inspection.",
    ),
    (
        "Our cat only drinks from a running tap.",
        "The cat refuses still water; it wants it flowing from the faucet.",
        "The kitchen tap has been dripping since the cat knocked it.",
    ),
    (
        "Nobody told the night shift that the machine was broken.",
        "The workers who came in the evening were not informed about the faulty equipment.",
        "The night shift repaired the machine before anybody noticed.",
    ),
    (
        "The new battery lasts longer than the old one.",
        "You get more hours out of a charge with the replacement battery.",
        "The old battery lasts longer than the new one.",
    ),
)

_KOREAN = (
    (
        "부산으로 가는 막차는 밤 열한 시에 떠나요.",
        "밤 11시가 지나면 부산행 기차가 더는 없습니다.",
        "부산으로 가는 기차에서 오랜 친구를 우연히 만났어요.",
    ),
    (
        "김치찌개는 묵은 김치로 끓여야 제맛이 난다.",
        "푹 익은 김치를 써야 김치찌개가 맛있어진다.",
        "김치찌개를 먹다가 흰 셔츠에 국물을 흘렸다.",
    ),
    (
        "계단에서 넘어져 무릎을 다치는 바람에 당분간 뛸 수 없다.",
        "층계에서 굴러 무릎이 상했기 때문에 한동안 달리기는 무리다.",
        "무릎을 튼튼하게 하려고 매일 계단을 뛰어 올라간다.",
    ),
    (
        "파일이 2기가바이트를 넘으면 프로그램이 갑자기 종료됩니다.",
        "용량이 2기가바이트보다 큰 파일을 열면 프로그램이 꺼져 버려요.",
        "이 프로그램은 2기가바이트가 넘는 파일을 작게 압축해 줍니다.",
    ),
    (
        "어젯밤 내린 폭우로 지하철역이 물에 잠겼다.",
        "밤새 쏟아진 비에 지하철역이 침수되었다.",
        "지하철역 앞에서 우산을 파는 할머니를 보았다.",
    ),
    (
        "은행이 대출 금리를 0.5퍼센트포인트 올렸다.",
        "은행에서 돈을 빌릴 때 내는 이자가 반 퍼센트포인트 비싸졌다.",
        "은행나무 잎이 노랗게 물들어 거리가 환해졌다.",
    ),
    (
        "경기 종료 직전에 터진 골로 우리 팀이 우승했다.",
        "마지막 순간의 득점 덕분에 우리가 트로피를 들어 올렸다.",
        "경기가 끝나고 우리 팀은 관중석의 쓰레기를 주웠다.",
    ),
    (
        "우주 망원경이 빅뱅 직후에 생긴 은하를 촬영했다.",
        "우주 초기에 태어난 은하의 모습이 망원경에 포착되었다.",
        "작은 망원경과 휴대전화만 있으면 달을 촬영할 수 있다.",
    ),
    (
        "보고서는 금요일 정오까지 제출하세요. 늦으면 감점입니다.",
        "금요일 낮 12시가 마감이고, 그 뒤에 내는 보고서는 점수가 깎입니다.",
        "금요일 보고서 작성 수업은 정오로 옮겨졌습니다.",
    ),
    (
        "그는 악보도 보지 않고 피아노 협주곡을 끝까지 연주했다.",
        "피아니스트는 협주곡 전체를 외워서 쳤다.",
        "그는 피아노를 옮기다가 허리를 삐끗했다.",
    ),
    (
        "배송 완료라고 나오는데 문 앞에 아무것도 없어요.",
        "택배가 도착했다고 뜨지만 저는 물건을 받지 못했습니다.",
        "부탁하신 대로 택배를 문 앞에 두고 갑니다.",
    ),
    (
        "윗집에서 밤마다 쿵쿵거려서 잠을 잘 수가 없다.",
        "위층의 발소리 때문에 밤에 잠들기가 어렵다.",
        "윗집에서 이사 왔다며 떡을 돌렸다.",
    ),
    (
        "우리 고양이는 흐르는 물만 마신다.",
        "고양이가 고인 물은 싫어하고 수도꼭지에서 나오는 물만 먹어요.",
        "고양이가 물컵을 넘어뜨려 책상이 흠뻑 젖었다.",
    ),
    (
        "야간 근무자에게 기계가 고장 났다고 알려 준 사람이 아무도 없었다.",
        "밤에 일하는 직원들은 설비에 문제가 있다는 말을 전혀 듣지 못했다.",
        "야간 근무자가 아무도 모르게 고장 난 기계를 고쳐 놓았다.",
    ),
    (
        "동생이 형보다 키가 크다.",
        "형은 동생만큼 키가 크지 않다.",
        "형이 동생보다 키가 크다.",
    ),
)  # fmt: skip

# Alternating, so that any first few of them are in both languages.
TRIPLES = tuple(
    Triple(language, *sentences)
    for both in zip(_ENGLISH, _KOREAN, strict=True)
    for language, sentences in zip(("English", "Korean"), both, strict=True)
)
LANGUAGES = ("English", "Korean")
