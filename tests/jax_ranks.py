"""A JAX trainer on several processes of two devices each; started by `run_ranks`, not collected by pytest."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
MESHES = ("expert=4",)
"""Experts over both processes; a second mesh would double what is compiled, half a minute of a core."""


def losses_of(mesh: str | None, folder: Path) -> list[float]:
    """Losses of three steps; `folder` has the state after two."""
    from moe import MoEConfig
    from moe.nnx import parse_mesh
    from moe.nnx.training.optimisation import Optimisation
    from moe.nnx.training.training import Trainer

    how = Optimisation(weight_decay=0.1, betas=(0.9, 0.95), clip_norm=1.0, precision="float32", seed=0)
    trainer = Trainer(MoEConfig(**SIZES), how, mesh=None if mesh is None else parse_mesh(mesh))
    token_ABS = np.random.default_rng(0).integers(0, 32, (2, 4, 10))
    losses = [float(trainer.step(token_ABS, 1e-2, number).loss) for number in range(2)]
    trainer.save(folder)
    return [*losses, float(trainer.step(token_ABS, 1e-2, 2).loss)]


def pipeline_of(mesh: str | None, folder: Path) -> list[float]:
    """Losses and answers of a model of one's own; `folder` has the state after two steps."""
    import jax.numpy as jnp
    import optax

    from moe.nnx import Pipeline, parse_mesh

    random = np.random.default_rng(1)
    examples = [(random.normal(size=6).astype(np.float32), number % 3) for number in range(12)]
    params = {
        name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in (("a", (6, 8)), ("b", (8, 3)))
    }

    def collate(chosen: Any) -> dict[str, np.ndarray]:
        return {"x": np.stack([x for x, _ in chosen]), "label": np.array([label for _, label in chosen])}

    def scores(params: Any, batch: Any) -> Any:
        return jnp.tanh(batch["x"] @ params["a"]) @ params["b"]

    def loss(params: Any, batch: Any, key: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(scores(params, batch), batch["label"]).mean()

    pipeline = Pipeline(
        params,
        collate=collate,
        loss=loss,
        predict=scores,
        optimizer=optax.adam(1e-2),
        mesh=None if mesh is None else parse_mesh(mesh),
    )
    losses = pipeline.fit(examples, batch_size=4, epochs=2)
    folder.mkdir(parents=True, exist_ok=True)
    pipeline.save(folder / "pipeline.safetensors")
    return [*losses, *pipeline.predict(examples, batch_size=8).ravel().tolist()]


def main() -> None:
    place = Path(os.environ["RANKS_FOLDER"])
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    import jax

    jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", num_processes=count, process_id=rank)
    found: dict[str, Any] = {mesh: losses_of(mesh, Path(sys.argv[1]) / mesh) for mesh in MESHES}
    found["pipeline"] = pipeline_of("data=2,tensor=2", Path(sys.argv[1]) / "pipeline")
    if rank == 0:
        (place / "found.json").write_text(json.dumps(found))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
