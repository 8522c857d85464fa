"""Statistics of solves during training: what is recorded, when it is read, and the warning when solves get worse."""

import contextlib
import copy
import csv
import math
import warnings

import pytest
import torch
from torch import nn

from implicit import FixedPointLayer, checked_maps, monitor_solves, record_solutions
from implicit.diagnostics import solve_monitor
from solvers import ConvergenceError, ConvergenceWarning


class Rate(nn.Module):
    """A contraction whose rate can be changed."""

    def __init__(self, rate=0.3):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate))

    def forward(self, z, x):
        return self.rate * z + x


class Tracker:
    def __init__(self):
        self.logged = []

    def log(self, values, step):
        self.logged.append((step, values))


def model():
    return nn.Sequential(FixedPointLayer(Rate(), solver="picard", on_failure="ignore"))


def test_every_step_is_recorded_a_step_late(tmp_path):
    net, tracker, file = model(), Tracker(), tmp_path / "solves.csv"
    x = torch.randn(4, 3)
    with monitor_solves(net, tracker=tracker, csv_file=file) as monitor:
        for step in range(3):
            z, solution = net[0](x, return_solution=True)
            z.sum().backward()
            assert len(tracker.logged) == max(0, step - 1)
            monitor.step()
    assert [step for step, _ in tracker.logged] == [0, 1, 2]
    values = tracker.logged[0][1]
    assert values["solves/0/samples"] == 4
    assert values["solves/0/converged"] == 1
    assert values["solves/0/calls"] == solution.num_evals
    assert values["solves/0/mean_steps"] == solution.num_steps.float().mean()
    assert values["solves/0/max_steps"] == solution.num_steps.max()
    assert values["solves/0/worst_residual"] == pytest.approx(float(solution.residual.detach().max()))
    with open(file, newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    assert {row["layer"] for row in rows} == {"0"}
    assert float(rows[0]["mean_steps"]) == pytest.approx(float(solution.num_steps.float().mean()), rel=1e-5)
    assert "_solve" not in vars(net[0])


def test_tensorboard_writer_and_every(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    writer = tensorboard.SummaryWriter(tmp_path)
    net = model()
    with monitor_solves(net, tracker=writer, every=2) as monitor:
        for step in range(5):
            net(torch.randn(2, 3))
            monitor.step(10 + step)
    writer.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("solves/0/mean_steps")] == [10, 12, 14]


def test_file_goes_on_where_a_run_does(tmp_path):
    file, net = tmp_path / "solves.csv", model()

    def train_steps(start, stop):
        torch.manual_seed(start)
        with monitor_solves(net, csv_file=file, start=start) as monitor:
            for _ in range(start, stop):
                net(torch.randn(2, 3))
                monitor.step()

    def steps():
        return [int(line.split(",")[0]) for line in file.read_text().splitlines()[1:]]

    train_steps(0, 6)
    file.write_text(file.read_text() + "6,0,2")  # cut off
    train_steps(4, 8)
    assert steps() == list(range(8))
    train_steps(0, 2)
    assert steps() == [0, 1]


def test_solves_of_a_test_are_skipped():
    net = model()
    with monitor_solves(net) as monitor:
        net(torch.randn(2, 3))
        monitor.step()
        with torch.no_grad():
            net(torch.randn(5, 3))
        monitor.skip()
        net(torch.randn(2, 3))
        monitor.step()
        monitor.step()
        assert monitor.latest["0"].samples == 2


def test_solves_of_one_step_are_summed():
    net = model()
    with monitor_solves(net) as monitor:
        net(torch.randn(2, 3))
        net(torch.randn(5, 3))
        monitor.step()
    assert monitor.latest["0"].samples == 7


def train(monitor, net, rates, samples=4):
    for rate in rates:
        with torch.no_grad():
            net[0].f.rate.fill_(rate)
        net(torch.ones(samples, 3))
        monitor.step()


def test_warning_says_once_what_changed():
    net = model()
    window = solve_monitor.WINDOW
    with monitor_solves(net) as monitor:
        train(monitor, net, [0.3] * (2 * window))
        assert not monitor.degraded
        with pytest.warns(ConvergenceWarning, match="The solves of '0' have become worse") as caught:
            train(monitor, net, [0.99] * (2 * window))
    (warning,) = caught
    assert "85% of the samples converge instead of 100%" in str(warning.message)
    assert "steps on average instead of 9.0" in str(warning.message)
    assert "implicit.diagnose" in str(warning.message)
    assert list(monitor.degraded) == ["0"]


def test_the_best_window_is_the_baseline():
    """Solves that are slow at first, then fast, and then slow again have become worse."""
    net = model()
    window = solve_monitor.WINDOW
    with monitor_solves(net) as monitor:
        train(monitor, net, [0.7] * window + [0.3] * 2 * window)
        with pytest.warns(ConvergenceWarning, match="steps on average"):
            train(monitor, net, [0.7] * 2 * window)


def test_steady_solves_give_no_warning():
    net = model()
    torch.manual_seed(0)
    with warnings.catch_warnings(), monitor_solves(net) as monitor:
        warnings.simplefilter("error")
        for _ in range(4 * solve_monitor.WINDOW):
            train(monitor, net, [0.3 + 0.05 * float(torch.rand(()))])
    assert not monitor.degraded


def test_fixed_number_of_steps_has_no_residual():
    net = nn.Sequential(FixedPointLayer(Rate(), solver="picard", rtol=None, max_steps=3))
    tracker = Tracker()
    with monitor_solves(net, tracker=tracker) as monitor:
        net(torch.randn(2, 3))
        monitor.step()
    assert monitor.latest["0"].worst_residual != monitor.latest["0"].worst_residual
    assert monitor.latest["0"].mean_steps == 3
    assert "solves/0/worst_residual" not in tracker.logged[0][1]


def test_monitors_can_be_nested():
    net = model()
    with monitor_solves(net) as outer, monitor_solves(net) as inner:
        net(torch.randn(2, 3))
        inner.step()
        outer.step()
    assert outer.latest == inner.latest
    assert outer.latest["0"].samples == 2


def test_failed_training_step_is_recorded_too(tmp_path):
    net, file = model(), tmp_path / "solves.csv"

    def crash():
        with monitor_solves(net, csv_file=file):
            net(torch.randn(2, 3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        crash()
    assert len(file.read_text().splitlines()) == 2
    assert "_solve" not in vars(net[0])


def test_unfit_arguments_are_refused():
    with pytest.raises(TypeError, match="tracker must be a SummaryWriter"), monitor_solves(model(), tracker=3):
        pass
    with pytest.raises(ValueError, match="start must be an integer >= 0, got -1"), monitor_solves(model(), start=-1):
        pass
    with pytest.raises(ValueError, match="every must be a positive integer, got 0"), monitor_solves(model(), every=0):
        pass
    with pytest.raises(TypeError, match="must be a torch.nn.Module"), monitor_solves(torch.cos):
        pass


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"\xff\xfe\x00"])
@pytest.mark.parametrize("start", [0, 2])
def test_a_file_of_another_kind_is_left_as_it_is(tmp_path, content, start):
    file = tmp_path / "data.csv"
    file.write_bytes(content)
    monitored = monitor_solves(FixedPointLayer(lambda z, x: 0.5 * z + x), csv_file=file, start=start)
    with pytest.raises(ValueError, match="data.csv holds something other than the lines of monitor_solves"), monitored:
        pass
    assert file.read_bytes() == content


def test_records_may_be_nested():
    layer = FixedPointLayer(lambda z, x: 0.5 * z + x)
    with record_solutions(layer) as outer, record_solutions(layer) as inner:
        layer(torch.ones(1, 2))
    assert len(outer[""]) == len(inner[""]) == 1


def test_solves_that_raise_are_counted_and_recorded():
    layer = FixedPointLayer(Rate(), solver="picard", rtol=1e-6, max_steps=3, on_failure="raise")
    with monitor_solves(layer) as monitor, record_solutions(layer) as record:
        for scale in (0.0, 1.0, 2.0):
            with contextlib.suppress(ConvergenceError):
                layer(scale * torch.ones(4, 2))
        monitor.step()
    found = monitor.latest[""]
    assert (found.samples, found.max_steps) == (12, 3)
    assert found.converged == pytest.approx(1 / 3)
    assert [bool(solution.converged.all()) for solution in record[""]] == [True, False, False]


def test_copies_made_in_a_record_are_not_recorded_and_can_be_pickled(tmp_path):
    layer = FixedPointLayer(Rate())
    with record_solutions(layer) as record, checked_maps(layer):
        twin = copy.deepcopy(layer)
        twin(torch.ones(1, 2))
    with record_solutions(layer), checked_maps(layer):
        torch.save(layer, tmp_path / "layer.pt")
    twin(torch.ones(1, 2))
    torch.load(tmp_path / "layer.pt", weights_only=False)(torch.ones(1, 2))
    assert record[""] == []


def test_digits_of_counts_and_residuals_that_are_infinite(tmp_path):
    layer = FixedPointLayer(lambda z, x: x * z + x, solver="picard", rtol=1e-3, max_steps=2, on_failure="ignore")
    with monitor_solves(layer, csv_file=tmp_path / "solves.csv") as monitor:
        layer(0.1 * torch.ones(1_234_567, 1))
        monitor.step()
        layer(torch.tensor([[math.nan]]))
        monitor.step()
    first, second = csv.DictReader((tmp_path / "solves.csv").read_text().splitlines())
    assert first["samples"] == "1234567"
    assert second["worst_residual"] == "inf"
