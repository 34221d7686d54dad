"""Lightning trains on a queue and goes on where a checkpoint left it: `make test-second` has it."""

import itertools

import pytest
import torch

import voxloom as vx

pl = pytest.importorskip("lightning.pytorch", reason="Lightning is in an environment of its own: make test-second")
lightning = pytest.importorskip("voxloom.integrations.lightning")


class Network(pl.LightningModule):
    def __init__(self, asks=False):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.asks, self.losses = torch.nn.Conv3d(1, 8, 3, padding=1), asks, []

    def forward(self, batch):
        return self.net(batch)

    def training_step(self, batch, _):
        loss = torch.nn.functional.cross_entropy(self(batch.t1.data / 500), batch.labels.data[:, 0].long())
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, _):
        self.log("seen", float(len(batch.t1.data)), batch_size=1, reduce_fx="sum")

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        if not self.asks:
            return optimizer
        steps = self.trainer.estimated_stepping_batches  # after which Lightning forgets the states of loaders
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)]


class Interrupt(pl.Callback):
    """Saves a checkpoint after some steps, and ends the training."""

    def __init__(self, steps, path):
        self.steps, self.path = steps, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path)
            raise RuntimeError("interrupted")


def queue(workers=0):
    heads = [vx.datasets.HeadPhantom(24, seed=number) for number in range(3)]
    return vx.Queue(heads, 8, 6, vx.UniformSampler(12), seed=0, num_workers=workers)


def trainer_of(*callbacks, epochs=3):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), **quiet)


def fit(way, workers=0, asks=False, callbacks=(), checkpoint=None):
    network, trainer = Network(asks), trainer_of(*callbacks, *([lightning.ResumeLoaders()] if way == "callback" else []))
    try:
        if way == "module":
            data = lightning.PatchDataModule(lambda: queue(workers), batch_size=3)
            trainer.fit(network, datamodule=data, ckpt_path=checkpoint)
        else:
            trainer.fit(network, vx.SubjectsLoader(queue(workers), batch_size=3), ckpt_path=checkpoint)
    except RuntimeError as error:
        assert "interrupted" in str(error)
    return network.losses


pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning's own


@pytest.mark.parametrize(("way", "asks"), [("module", False), ("module", True), ("callback", True), ("plain", False)])
@pytest.mark.parametrize("steps", [2, 6, 8])
def test_training_goes_on_with_the_very_next_batch(tmp_path, way, asks, steps):
    whole = fit("module", 0, asks)
    assert len(whole) == 18
    begun = fit(way, 2, asks, [Interrupt(steps, tmp_path / "c.ckpt")])
    assert len(begun) == steps
    assert begun + fit(way, 1, asks, checkpoint=tmp_path / "c.ckpt") == whole


class Save(pl.Callback):
    """Saves a checkpoint after the first epoch, or after its last batch."""

    def __init__(self, path, at_batch):
        self.path, self.at_batch = path, at_batch

    def on_train_batch_end(self, trainer, *_):
        if self.at_batch and trainer.global_step == 2:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer, *_):
        if not self.at_batch and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("at_batch", [False, True])
def test_epochs_that_the_trainer_cuts_short_are_over(tmp_path, at_batch):
    def losses(*callbacks, checkpoint=None):
        network, trainer = Network(), trainer_of(*callbacks)
        trainer.limit_train_batches = 2
        trainer.fit(network, datamodule=lightning.PatchDataModule(queue, batch_size=3), ckpt_path=checkpoint)
        return network.losses

    whole = losses(Save(tmp_path / "after.ckpt", at_batch))
    assert len(whole) == 6
    assert losses(checkpoint=tmp_path / "after.ckpt") == whole[2:]


def test_a_loader_that_lightning_makes_anew_for_its_ranks_is_the_same():
    from lightning.pytorch.utilities.data import _update_dataloader

    heads = [vx.datasets.HeadPhantom(24, seed=number) for number in range(3)]
    seen = []

    def note(batch):
        seen.append(len(batch.t1.data))
        return batch

    loader = vx.SubjectsLoader(vx.SubjectsDataset(heads), 2, batch_transform=note)
    list(_update_dataloader(loader, torch.utils.data.SequentialSampler(loader.dataset)))
    assert seen == [2, 1]


def test_what_lightning_forgets_is_seen_in_the_losses(tmp_path):
    """If this fails, Lightning has mended it, and `ResumeLoaders` may go."""
    whole = fit("plain", 0, asks=True)
    begun = fit("plain", 0, True, [Interrupt(8, tmp_path / "c.ckpt")])
    assert begun + fit("plain", 0, True, checkpoint=tmp_path / "c.ckpt") != whole


def test_losses_are_the_same_for_every_number_of_workers():
    assert fit("module", 0) == fit("module", 1) == fit("module", 2)


def test_patches_are_validated_on_too():
    head = vx.datasets.HeadPhantom(24, seed=9)
    data = lightning.PatchDataModule(queue(), vx.GridSampler(head, 12), batch_size=3, val_batch_size=4)
    trainer = trainer_of(epochs=1)
    trainer.fit(Network(), datamodule=data)
    assert trainer.callback_metrics["seen"] == 8


def test_volumes_are_validated_on():
    heads = [vx.datasets.HeadPhantom(24, seed=number) for number in (7, 8)]
    validation = lightning.VolumeValidation(heads, 12, image="t1", labels="labels", network="net", every_n_epochs=2)
    trainer, network = trainer_of(validation, epochs=2), Network()
    trainer.fit(network, datamodule=lightning.PatchDataModule(queue(), batch_size=3))
    predictor = vx.Predictor(network.net, 12, 0.5, reduce="argmax")
    found = [lightning.dice(predictor(head, image_name="t1").data, head.labels.data) for head in heads]
    logged = trainer.callback_metrics
    assert float(logged["val_dice"]) == pytest.approx(sum(each["dice"] for each in found) / 2)
    for name in found[0]:
        assert float(logged[f"val_{name}"]) == pytest.approx(sum(each[name] for each in found) / 2)
    assert network.training


def test_batches_may_come_transformed():
    def brighter(batch):
        batch.t1.data = batch.t1.data + 1000 * torch.rand(1)
        return batch

    data = lightning.PatchDataModule(queue(), batch_size=3, batch_transform=brighter)
    plain = lightning.PatchDataModule(queue(), batch_size=3)
    pairs = zip(data.train_dataloader(), itertools.islice(plain.train_dataloader(), 3), strict=False)
    assert all((one.t1.data - other.t1.data).min() > 0 for one, other in pairs)


def test_accelerate_saves_and_loads_the_state_of_a_loader(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="Accelerate is in an environment of its own: make test-second")
    whole = [batch.t1.data for batch in vx.SubjectsLoader(queue(), batch_size=3)]
    accelerator, loader = accelerate.Accelerator(cpu=True), vx.SubjectsLoader(queue(), batch_size=3)
    accelerator.register_for_checkpointing(loader)
    batches = iter(loader)
    begun = [next(batches).t1.data for _ in range(2)]
    accelerator.save_state(str(tmp_path))
    next(batches)
    accelerator.load_state(str(tmp_path))
    for one, other in zip(whole, begun + [batch.t1.data for batch in loader], strict=True):
        assert torch.equal(one, other)


def test_nothing_is_shown_by_its_address():
    validation = lightning.VolumeValidation([vx.datasets.HeadPhantom(24)], 12, image="t1", labels="labels")
    for shown in (lightning.PatchDataModule(queue), lightning.PatchDataModule(queue()), lightning.ResumeLoaders(), validation):
        assert " at 0x" not in repr(shown)
