"""The subcommand ``fovea embed``. What it does is imported only when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.cli.choices import Pooling, StoredType, local_only
from launch.cli.shards import Overrides


def enter(app: typer.Typer, command_line: list[str]) -> None:
    """Add the subcommand to the command line.

    Args:
        app: the command line.
        command_line: filled with the arguments of this process, for ranks that run the same command.
    """

    @app.command(short_help="Embed shards: the features of every image as Parquet.")
    def embed(
        run: Annotated[
            str,
            typer.Argument(
                metavar="RUN|CHECKPOINT|WEIGHTS",
                help="A run, one of its checkpoints, or weights of timm, Hugging Face or open_clip.",
            ),
        ],
        shards: Annotated[str, typer.Argument(metavar="SHARDS", help="A path or URL with {000..123} or *.")],
        out: Annotated[Path, typer.Option(metavar="DIR", help="Output folder.", callback=local_only)],
        overrides: Overrides = None,
        pooling: Annotated[Pooling, typer.Option(help="Class token, mean of the patch tokens, or patch tokens.")] = Pooling.CLS,
        patches: Annotated[int, typer.Option(min=1, help="Patch tokens of each image, with --pooling patches.")] = 16,
        dtype: Annotated[StoredType, typer.Option(help="Data type of the stored numbers.")] = StoredType.FP16,
        size: Annotated[
            str | None,
            typer.Option(metavar="PIXELS", help="Side of the images in pixels, or HEIGHTxWIDTH; the network's own by default."),
        ] = None,
        batch_size: Annotated[
            int | None, typer.Option(min=1, help="Images of a forward pass; evaluation.knn.batch_size by default.")
        ] = None,
        model: Annotated[str | None, typer.Option(metavar="NAME", help="timm model name of a weights file.")] = None,
        ranks: Annotated[
            int | None, typer.Option(min=1, help="Number of processes; by default one per GPU, or 1 without GPUs.")
        ] = None,
        cluster: Annotated[
            str,
            typer.Option(
                "--cluster", "-c", metavar="PROFILE", help="Submit a Slurm job to this cluster; cluster.KEY=VALUE overrides."
            ),
        ] = "",
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace embeddings that are in the folder.")] = False,
    ) -> None:
        """Write the features of every accepted sample to Parquet, one file per shard, for pyarrow, DuckDB or FAISS.

        Columns: key, shard, row (the sample's number is shard << 32 | row), embedding, width, height, label, caption_bytes,
        image_bytes, and digest, a hash of the image's bytes; with --pooling patches also patch. Samples that cannot be used are
        listed in bad_samples.jsonl. Images are prepared as in fovea eval.

        If it is killed, the same command continues, on any number of ranks, and gives the same bytes. The folder is complete
        once it holds embeddings.json.

        [b]Examples[/b]

        fovea embed runs/vitl16 'train-{00000..00099}.tar' --out embeddings

        fovea embed timm:vit_small_patch14_dinov2 's3://bucket/train-*.tar' --out dinov2 --pooling mean --ranks 8

        fovea embed runs/vitl16/checkpoints/step_000003750 'val-*.tar' --out val --pooling patches --patches 32 --dtype fp32

        fovea embed runs/vitl16 '/data/train-*.tar' --out /data/embeddings --cluster site.yaml cluster.nodes=4
        """
        from launch.cli.embed_ranks import EmbedOptions
        from launch.cli.embed_ranks import run as embed_shards
        from pipeline.config.sizes import parse_size

        options = EmbedOptions(
            shards, out, pooling.value, patches, dtype.value, parse_size(size), batch_size, model, ranks, overwrite, cluster
        )
        raise typer.Exit(embed_shards(run, overrides or (), options, command_line))
