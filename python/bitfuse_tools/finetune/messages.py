"""Short messages and what their writers want, written for this project.

Four intents over everyday matters: to learn something, to have something done, to complain, to praise. The
matter says nothing of the intent (the same hotel, train or printer appears under several), and the wording is
varied: questions without a question mark, requests that look like questions, complaints in a polite tone. The
held-out messages are about other matters than the training ones. The Korean messages are no translations.
"""

from __future__ import annotations

from dataclasses import dataclass

# The intents, and the sentence that stands for each one: a message belongs to the nearest.
INTENTS = {
    "question": "The writer wants to know something and asks for information.",
    "request": "The writer wants something to be done and asks for it.",
    "complaint": "The writer complains that something went wrong.",
    "praise": "The writer is pleased with something and says so.",
}
LANGUAGES = ("English", "Korean")


@dataclass(frozen=True)
class Message:
    """One message, its intent (a key of INTENTS) and its language."""

    text: str
    intent: str
    language: str


_TRAINING = {
    ("question", "English"): """
        Which platform does the night train to Lisbon leave from?
        How many loaves do you bake on an ordinary Sunday?
        Does the gym open before six on weekdays?
        I was wondering whether the library lends board games.
        Can the app read files that were written by the old version?
        Is breakfast part of the room rate?
        Who pays for the heating, the tenant or the owner?
        What happens to unused data at the end of the month?
        Will the filling hurt once the injection wears off?
        Do you know when the blue kettle will be back in stock?
        Is there anything on the menu without nuts?
        At what age do children move up to the second class?
        Where do I find the serial number of the printer?
        Are dogs allowed in the rear carriage?
        How long does sourdough keep in a paper bag?
        I'd like to know what the yearly membership includes.
        Until when can a reserved book be picked up?
        Does the update need a restart?
        How far is the hotel from the ferry on foot?
        Is the deposit returned with interest?
        Can I keep my number if I change the plan?
        How often should a grown-up have their teeth cleaned?
        What is the difference between the two blenders besides colour?
        Which wine goes with the lamb?
        Do pupils need their own calculator for the exam?
        What does the orange light next to the tray mean?
        Is the ticket valid on the slow train as well?
        Are your rolls baked here or delivered frozen?
        Could you tell me how busy the pool is on Friday evenings?
        Do late fees apply to audio books too?
        Where does the program keep its backups?
        How late may we check in on the day we arrive?
        May I paint the walls in a darker colour?
        Does roaming cover Switzerland, or only the neighbours in the union?
        How long must I wait to eat after the treatment?
        Whether the jacket runs small is the one thing the page doesn't say.
        Do you take groups of fifteen without a booking?
        When are the report cards handed out this year?
        How many pages does one cartridge print?
        Is there a quiet coach on the morning service?
        What flour do you use for the rye bread?
        Do I have to bring my own towel?
        Is it possible to renew a loan twice in a row?
        Why are there two versions of the manual?
    """,
    ("request", "English"): """
        Please move my seat reservation to the window side.
        Put two rye loaves aside for me, I'll come by at five.
        Could someone switch off the music in the weight room?
        Extend my loan of the atlas by two more weeks, please.
        Kindly restore the folder that I deleted this morning.
        We need an extra cot in room twelve tonight.
        Send a plumber to the third floor as soon as you can.
        Cancel the second phone line from the first of May.
        I want my appointment shifted to some day after Wednesday.
        Change the delivery address to my office in Mill Street.
        A table by the garden for four at eight, please.
        Would you sign the form for the school trip and return it?
        Have a technician look at the printer before noon.
        Forward the receipt for my trip to our accounts department.
        Slice the bread thinly for me, would you.
        Freeze my membership for the three months I'm abroad.
        Please let the children's section know that we are coming with twenty pupils.
        Add a dark theme to the editor in the next release.
        Wake us at half past four and order a taxi for five.
        Give me a copy of the signed lease.
        Raise my data limit to thirty gigabytes from next month on.
        Email the X-ray to the clinic in Turin.
        Wrap it as a present and leave the price tag out.
        Bring us the bill and two more coffees.
        Excuse my son from sports this Thursday.
        Order three black cartridges for the second-floor office.
        Hold the connection if you can, our bus is ten minutes behind.
        I'd ask you to label the cakes that contain alcohol.
        Book the small studio for us on Tuesday at seven.
        Buy the new translation of the Odyssey for the library.
        Unlock my account so that I can work again.
        Leave fresh towels at the door instead of coming in.
        The key to the cellar should be handed to my neighbour while I'm away.
        Switch my contract to paperless bills.
        Remind me a day ahead by text message.
        Refund the amount to the card I paid with.
        Take the mushrooms off my pizza and add olives.
        Let me see my daughter's test before the meeting.
        Print forty copies on both sides and staple them.
        Save us two places in the bicycle car.
        Could I get the recipe for the walnut rolls written down?
        Turn the heating up a little in the yoga room.
        Drop the book in my locker if it arrives today.
        Translate the error messages into Polish, please.
    """,
    ("complaint", "English"): """
        The train stood in a field for two hours and nobody told us why.
        My loaf had a piece of plastic baked into it.
        Half of the showers have been cold since Monday.
        I was charged a fee for a book that I returned in time.
        The app eats my battery in less than three hours.
        Our room smelled of smoke although we had booked non-smoking.
        It has been raining through the ceiling for a week and the owner doesn't call back.
        My bill shows calls to numbers I have never heard of.
        I waited ninety minutes past my appointment with an aching tooth.
        The parcel was left in the rain and the books are ruined.
        The soup came cold, twice.
        Nobody informed the parents that the class had been cancelled.
        The new printer jams on every third page.
        There was no heating in our carriage in the middle of January.
        The rolls were yesterday's and sold as fresh.
        People leave their sweat on the machines and staff look away.
        The reading room is louder than the café next door.
        Since the update my drawings open as blank pages.
        The receptionist argued with us in front of the other guests.
        The lift is out of order for the fifth time this spring.
        I pay for fast internet and get the speed of a modem.
        The crown you fitted broke after nine days.
        You sent the wrong size again, and again without a return label.
        They seated us by the toilets though we had reserved at the window.
        My daughter is bullied on the school bus and nothing is done.
        Cartridges that are said to last a year are empty by March.
        The conductor was rude to an old lady with a valid ticket.
        Three euros more for the same bread, and it is smaller too.
        My locker was broken into while I was swimming.
        Two chapters are missing from the book I borrowed.
        Support closed my ticket without answering it.
        The walls are so thin that we heard our neighbours all night.
        I've asked four times for the handrail to be mended, in vain.
        They cut off my phone although the invoice was paid.
        Nobody explained the costs before drilling.
        The photos on the shop's page show a different bag.
        We found a hair in the dessert and were laughed at.
        The exam covered a chapter that was never taught.
        It prints grey lines across every photograph.
        My reserved seat did not exist in that train.
        I got ill from the cream cake last Saturday.
        The trainer turned up half an hour late and left early.
        The online catalogue has been down for a fortnight.
        The installer put a toolbar on my computer that won't go away.
    """,
    ("praise", "English"): """
        The conductor found my lost glove and brought it to my seat, what a kind man.
        Your rye bread is the best I have eaten since I left home.
        I've never felt so welcome in a gym as in yours.
        The librarian picked exactly the books my son loves.
        The new version starts in a second, wonderful work.
        We slept like stones and the breakfast was a feast.
        Our landlord fixed the boiler on Christmas Eve, hats off to him.
        Changing my plan took two minutes and a friendly voice.
        For the first time in my life I wasn't afraid of the dentist.
        The vase arrived a day early and beautifully packed.
        That lamb melted on the tongue.
        Her maths teacher has made numbers fun for our daughter.
        The printer has run for six years without one fault.
        A spotless train, on time to the minute, with a view of the lake.
        The smell of your bakery makes my whole morning.
        Thanks to the trainer my back no longer hurts.
        What a lovely, bright reading room you have built.
        Support answered at midnight and solved it at once.
        The staff remembered our anniversary with flowers on the bed.
        I couldn't wish for better neighbours or a better house.
        Even on the mountain the reception was perfect.
        Gentle hands, clear words, no pain at all.
        The jacket fits as if it were made for me.
        We came for one drink and stayed four hours, it was that good.
        The school play moved us to tears, well done to all of them.
        Crisp colours, quiet, and a child could set it up.
        It was a pleasure to travel with such cheerful staff.
        My guests asked three times where I had bought the cake.
        The pool is so clean that I look forward to every lap.
        I'm grateful that you found the out-of-print edition for me.
        Finally an editor that stays out of my way, I love it.
        From the balcony we saw the sea and never wanted to leave.
        Everything was repaired by noon and the stairs were even swept.
        Your honest advice saved me eighty a year.
        My little girl now asks when she may go back to the dentist.
        Sewn with care, better than in the pictures.
        The waiter guessed what we would like and was right each time.
        He came home proud, thank you for believing in him.
        Ten thousand pages and still razor-sharp.
        Such a smooth ride, I finished my whole novel.
        The almond croissant alone is worth the trip.
        After a month of your classes I can climb the stairs without a break.
        The story hour for toddlers is a gift to this town.
        Installing it was easier than opening the box of tea beside me.
    """,
    ("question", "Korean"): """
        부산행 첫차는 몇 시에 출발하나요?
        이 빵에 우유가 들어가는지 궁금합니다.
        헬스장은 일요일에도 문을 여나요?
        책은 한 번에 몇 권까지 빌릴 수 있어요?
        예전 버전에서 만든 파일도 열리나요?
        조식은 몇 시까지 먹을 수 있는지 알고 싶어요.
        관리비에 수도 요금이 포함됩니까?
        남은 데이터는 다음 달로 넘어가나요?
        치료 후에 언제부터 밥을 먹어도 되나요?
        파란색 주전자는 언제 다시 들어와요?
        맵지 않은 메뉴는 어떤 것이 있나요?
        입학시험에 계산기를 가져가도 되나요?
        잉크 하나로 몇 장쯤 인쇄할 수 있습니까?
        강아지를 데리고 기차에 탈 수 있는지요?
        두 제품은 무엇이 다른가요?
        벽에 못을 박아도 괜찮은지 모르겠네요.
        호텔에서 항구까지 걸어서 얼마나 걸려요?
        성적표는 언제 나오나요?
    """,
    ("request", "Korean"): """
        좌석을 창가 쪽으로 바꿔 주세요.
        식빵 두 개만 따로 남겨 주시겠어요?
        운동실 음악 소리를 조금 줄여 주세요.
        대출 기간을 일주일만 늘려 주시기 바랍니다.
        어제 지운 폴더를 복구해 주세요.
        방에 이불을 하나 더 넣어 주시면 좋겠어요.
        보일러 기사님을 빨리 보내 주세요.
        다음 달부터 요금제를 낮춰 주세요.
        진료 예약을 금요일 오후로 옮겨 주십시오.
        배송지를 회사 주소로 바꿔 주시겠습니까?
        여덟 시에 네 명 자리 부탁드립니다.
        내일 체육 시간에는 아이를 쉬게 해 주세요.
        이 서류를 양면으로 서른 장 뽑아 주세요.
        영수증을 메일로 보내 주시면 감사하겠습니다.
        선물이니까 예쁘게 포장해 주세요.
        계약서 사본을 한 부 주셨으면 합니다.
        새벽 다섯 시에 깨워 주시고 택시도 불러 주세요.
        잠긴 제 계정을 풀어 주세요.
    """,
    ("complaint", "Korean"): """
        기차가 두 시간이나 늦었는데 안내 방송도 없었어요.
        빵에서 비닐 조각이 나왔습니다.
        샤워실에 월요일부터 찬물만 나와요.
        제때 반납했는데 연체료를 물리다니 어이가 없네요.
        업데이트한 뒤로 앱이 자꾸 꺼져요.
        금연실을 예약했는데 담배 냄새가 진동했어요.
        천장에서 일주일째 물이 새는데 집주인은 전화도 안 받습니다.
        걸지도 않은 전화 요금이 청구됐어요.
        예약하고 갔는데 한 시간 반을 기다렸습니다.
        택배를 비 오는 데 두고 가서 책이 다 젖었어요.
        국이 식어서 나왔고 다시 데워 주지도 않더군요.
        수업이 취소됐다는 걸 아무도 알려 주지 않았어요.
        새로 산 프린터가 세 장마다 종이를 씹습니다.
        직원이 손님들 앞에서 저희에게 소리를 질렀어요.
        또 다른 치수를 보내셨네요. 벌써 세 번째입니다.
        옆방 소리 때문에 밤새 한숨도 못 잤어요.
        때운 이가 열흘 만에 떨어졌습니다.
        돈은 다 냈는데 전화가 끊겼어요.
    """,
    ("praise", "Korean"): """
        승무원분이 잃어버린 장갑을 찾아 주셔서 정말 고마웠어요.
        이 집 빵은 먹어 본 것 중에 최고예요.
        트레이너 선생님 덕분에 허리가 다 나았어요.
        사서 선생님이 골라 준 책을 아이가 무척 좋아합니다.
        새 버전은 정말 빠르고 편하네요, 훌륭합니다.
        방도 깨끗하고 아침밥도 맛있어서 행복했어요.
        집주인께서 명절에도 보일러를 고쳐 주셔서 감동했습니다.
        상담원분이 친절해서 기분이 좋았어요.
        태어나서 처음으로 치과가 무섭지 않았어요.
        꽃병이 하루 일찍 아주 곱게 포장되어 왔어요.
        고기가 입에서 살살 녹더라고요.
        선생님 덕분에 아이가 수학을 좋아하게 됐습니다.
        육 년을 써도 고장 한 번 없는 좋은 프린터예요.
        기차가 깨끗하고 창밖 경치도 아름다웠어요.
        옷이 맞춘 것처럼 잘 맞아서 마음에 쏙 들어요.
        발코니에서 본 바다를 잊을 수가 없네요.
        한밤중에도 바로 해결해 주시다니 대단해요.
        수영장이 늘 깨끗해서 매일 가고 싶어요.
    """,
}

_HELD_OUT = {
    ("question", "English"): """
        Until what hour does the museum let people in?
        Is a deposit needed to rent the small van?
        How deep should tulip bulbs be planted?
        Do beginners and children swim in the same lane?
        Does the festival ticket include the camp site?
        What does it cost to true a bent wheel?
        I would be curious which of your cards works abroad without fees.
        How many people can watch on one subscription?
        Are the guided walks suitable for a pram?
        Which vaccine does a kitten get first?
        Can the sofa be taken apart for a narrow staircase?
    """,
    ("request", "English"): """
        Hold the painting for me until I have asked my wife.
        Have the van waiting at the airport with a child seat.
        Deliver ten bags of soil to the back gate.
        Put my son into the later swimming group, please.
        Send the festival wristbands to my new flat.
        Would you oil the chain while you have the bike?
        Block my card at once, it was left in a taxi.
        Remove the old television from my list of devices.
        Take the stitches out on Monday instead of Friday if possible.
        Carry the wardrobe up to the second floor and set it up there.
        Kindly trim the hedge down to the height of the fence.
    """,
    ("complaint", "English"): """
        The exhibition we had come for was closed without notice.
        The rental car had bald tyres and an empty tank.
        Every one of the roses I bought died within a week.
        The water in the children's pool was freezing and dirty.
        We stood in the mud for hours because the shuttle never came.
        My brakes squeal worse now than before the repair.
        The machine swallowed my card and the bank shrugs.
        Each film stops to load every two minutes.
        Our guide read from a sheet and lost half of the group.
        The vet billed us for a test that was not done.
        The table arrived with three legs and a deep scratch.
    """,
    ("praise", "English"): """
        The museum guards told us stories that no book has.
        The little red rental car was a joy on those winding roads.
        Thanks to your gardener the old apple tree is blooming again.
        She dives in without fear now, what a patient swimming teacher.
        Three days of music and sunshine, I'd go back tomorrow.
        My twenty-year-old bike rides like new.
        The lady at the bank spent an hour with my grandfather, bless her.
        What a delightful series, we watched it all in one weekend.
        The view from the last hill made up for every step.
        Our cat was treated like a queen at the vet's.
        Solid oak, a perfect finish, and it smells of the forest.
    """,
    ("question", "Korean"): """
        박물관은 월요일에 쉬나요?
        승합차를 빌리려면 보증금을 내야 합니까?
        튤립은 언제 심는 게 좋은지 알려면 누구에게 물어야 하나요?
        수영 강습은 몇 살부터 받을 수 있어요?
        이 카드는 해외에서도 수수료가 없나요?
    """,
    ("request", "Korean"): """
        아이용 좌석이 달린 차를 공항에 준비해 주세요.
        흙 열 포대를 뒷문 앞에 내려 주시면 됩니다.
        택시에 카드를 두고 내렸으니 바로 정지시켜 주세요.
        자전거를 맡기는 김에 체인에 기름도 쳐 주세요.
        옷장을 이층까지 올려서 조립해 주십시오.
    """,
    ("complaint", "Korean"): """
        보러 간 전시가 말도 없이 취소되어 있었어요.
        빌린 차의 타이어가 다 닳아 있었습니다.
        사 온 장미가 일주일도 못 가서 다 죽었어요.
        영화가 이 분마다 멈춰서 볼 수가 없네요.
        수리를 맡겼더니 브레이크 소리가 더 심해졌어요.
    """,
    ("praise", "Korean"): """
        해설사님의 이야기가 책보다 훨씬 재미있었어요.
        정원사님 덕분에 늙은 사과나무에 다시 꽃이 피었습니다.
        이제 아이가 물을 무서워하지 않아요, 좋은 선생님이세요.
        이십 년 된 자전거가 새것처럼 달려서 기뻐요.
        산 위에서 본 풍경은 정말 최고였어요.
    """,
}


def _messages(blocks: dict[tuple[str, str], str]) -> tuple[Message, ...]:
    return tuple(
        Message(line.strip(), intent, language)
        for (intent, language), block in blocks.items()
        for line in block.strip().splitlines()
    )


TRAINING = _messages(_TRAINING)
HELD_OUT = _messages(_HELD_OUT)
