"""The trained model as a folder: of a run that has ended, or of its last checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jdm.files import replaced
from jdm.loading import Loaded
from jdm.run import Run
from jdm.training import checkpoint, distributed
from jdm.training.folder import MODEL
from jdm.training.trainer import Trainer


def write_model(trainer: Trainer) -> Path:
    """The trained model, averaged, as a folder in the run's: the last one, or the best by run.best.

    Where networks are sharded the first process builds it from its checkpoint, by itself.
    """
    folder, best = trainer.run.out / MODEL, trainer.best.place
    if distributed.size() == 1:
        if best:
            checkpoint.load(checkpoint.State({}, {}, trainer.averages, {}), best)
        with trainer.averaged() as modules, replaced(folder) as draft:
            trainer.task.product.write(draft, modules)
    elif distributed.first():
        export_checkpoint(trainer.run, folder, best)
    distributed.barrier()
    return folder


def export_checkpoint(run: Run, folder: Path, place: Path | None = None) -> Path:
    """The averaged model of a run's last checkpoint, or the one given, built on the CPU, as a folder."""
    place = place or checkpoint.newest_whole(run.out)
    assert place is not None
    product = run.method.product(Loaded(replace(run, device="cpu")))
    averages = {name: module.eval() for name, module in product.modules.items()}
    checkpoint.load(checkpoint.State({}, {}, {k: checkpoint.trained(m) for k, m in averages.items()}, {}), place,
                    alone=True)
    with replaced(folder) as draft:
        product.write(draft, averages)
    return folder
