"""The report as one HTML page with pictures and styles inside."""

from __future__ import annotations

from pathlib import Path

from .plots import device_plots, model_plots
from .report import Report
from .svg import Plot, engine_variable

TEMPLATE = Path(__file__).with_name("report.html.j2")


def page(report: Report) -> str:
    """The whole page. Raises OptionError if matplotlib is missing."""
    from jinja2 import Environment
    from markupsafe import Markup

    def safe(plots: list[Plot]) -> list[dict[str, str]]:
        # The <svg> is written by svg.element, which escapes the names in it.
        return [{"caption": one.caption, "svg": Markup(one.svg)} for one in plots]

    pictures = {
        model.anchor: safe(model_plots(model.results, model.anchor))
        for section in report.sections
        for model in section.models
    }
    across = safe(device_plots(report.devices, "across")) if len(report.sections) > 1 else []
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(r=report, pictures=pictures, across=across, colour=engine_variable)
