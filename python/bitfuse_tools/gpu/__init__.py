"""`make gpu`: all that needs a GPU, in units that outlive each other, for a machine that is lent for minutes.

`folder.py`: what a run leaves; `units.py`: a process, its limit, what became of it; `run.py`: stage after
stage; `plan.py`: which units there are. None of these imports torch: they outlive a driver that does not
answer. What units do: `facts.py`, `smoke.py` (right?), `sweep.py` and `tune.py` (how fast?), `table.py` (as
predicted?)."""
