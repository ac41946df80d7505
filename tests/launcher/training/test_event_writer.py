"""TensorBoard's files on a disk that fills and gets space again."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher.training.monitoring.event_writer import EventWriter
from tests.launcher.disk import fill

# The writer's own thread ends with the error that is told here.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
VALUES = 400  # in each part: more than the queue of the writer's thread takes


def shown(folder) -> dict[int, float]:
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    events = reader.Scalars("loss")
    assert len({event.step for event in events}) == len(events)
    return {event.step: event.value for event in events}


@pytest.mark.parametrize("flushes", [True, False])
def test_what_a_full_disk_does_not_take_is_written_when_there_is_space(small_disk, flushes):
    said = []
    writer = EventWriter(small_disk / "tensorboard", 1, said.append)
    for step in range(1, 3 * VALUES + 1):
        if step == VALUES:
            fill(small_disk)
        if step == 2 * VALUES:
            (small_disk / "ballast").unlink()
        writer.add_scalar("loss", float(step), step)
        if flushes and step % 100 == 50:
            writer.flush()
    writer.close()
    assert shown(small_disk / "tensorboard") == {step: float(step) for step in range(1, 3 * VALUES + 1)}
    if flushes:
        assert len(said) == 2 and "No space left on device" in said[0] and "are written again" in said[1]


def test_where_there_is_no_space_to_the_end_it_is_said_and_nothing_raised(small_disk):
    said = []
    writer = EventWriter(small_disk / "tensorboard", 1, said.append)
    writer.add_scalar("loss", 0.0, 1)
    writer.flush()
    fill(small_disk)
    for step in range(2, VALUES):
        writer.add_scalar("loss", float(step), step)
        writer.flush()
    writer.forget_after(10)
    writer.add_scalar("loss", 0.0, 11)
    writer.close()
    assert len(said) == 2 and "kept in memory" in said[0] and "figures of the last steps are lost" in said[1]
    assert shown(small_disk / "tensorboard")[1] == 0.0
