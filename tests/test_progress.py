from moss_jax import progress


def test_durations_are_written_in_the_unit_that_fits():
    seconds = (0.0123, 3.44, 300, 27000)
    assert [progress.duration(value) for value in seconds] == ["12 ms", "3.4 s", "5 min", "7 h 30 min"]


def test_one_line_passes_per_interval(monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    lines = []
    say = progress.Progress(lines.append, interval=10)
    say("too early")
    say("note: always")
    now = 110.0
    say("due")
    say("too early again")
    say("100 of 100", force=True)
    assert lines == ["note: always", "due", "100 of 100"]


def test_every_line_passes_without_an_interval():
    lines = []
    say = progress.Progress(lines.append, interval=0)
    say("a")
    say("b")
    assert lines == ["a", "b"]
