"""TensorBoard's files on a disk that becomes full and later has space again."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher.training.monitoring.event_writer import EventWriter
from tests.launcher.disk import fill

# The writer's thread ends with the error of the full disk.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
VALUES = 400  # in each part; more than the queue of the writer's thread holds


def shown(folder) -> dict[int, float]:
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    events = reader.Scalars("loss")
    assert len({event.step for event in events}) == len(events)
    return {event.step: event.value for event in events}


@pytest.mark.parametrize("flushes", [True, False])
def test_values_that_a_full_disk_rejects_are_written_when_there_is_space(small_disk, flushes):
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
        assert len(said) == 2 and "No space left on device" in said[0] and "can be written to" in said[1]


def test_a_disk_that_stays_full_gives_a_message_and_no_error(small_disk):
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
