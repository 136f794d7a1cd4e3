"""python -m deploy.dashboard: prints the Grafana dashboard as JSON; scripts/dashboard keeps it in the repository."""

from grafana_foundation_sdk.builders import dashboard, prometheus, timeseries
from grafana_foundation_sdk.builders.common import VizLegendOptions
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, VisibilityMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef

from deploy.panels import ROWS, Chart

_WIDTH = 24  # of the screen, in Grafana's units
_HEIGHT = 5
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")


def build() -> dashboard.Dashboard:
    """Return one screen that tells the story, a row after the other."""
    board = (
        dashboard.Dashboard("Thumbloop")
        .uid("thumbloop")
        .description("A policy that learns from thumbs while it serves.")
        .tags(["thumbloop"])
        .time("now-1h", "now")
        .refresh("10s")
        .timezone("browser")
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus"))
    )
    for title, charts in ROWS.items():
        board.with_row(dashboard.Row(title))
        narrow, spare = divmod(_WIDTH, len(charts))
        for number, chart in enumerate(charts):
            panel = _panel(chart).span(narrow + (number < spare)).height(_HEIGHT)
            board.with_panel(panel)
    return board


def _panel(chart: Chart) -> timeseries.Panel:
    legend = VizLegendOptions().show_legend(True)
    legend.display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    panel = (
        timeseries.Panel()
        .title(chart.title)
        .description(chart.words)
        .unit(chart.unit)
        .datasource(_SOURCE)
        .legend(legend)
        .show_points(VisibilityMode.NEVER)
    )
    for number, (words, query) in enumerate(chart.queries.items()):
        panel.with_target(
            prometheus.Dataquery()
            .expr(query)
            .legend_format(words)
            .ref_id(chr(ord("A") + number))
            .datasource(_SOURCE)
        )
    return panel


if __name__ == "__main__":
    print(JSONEncoder(sort_keys=True, indent=2).encode(build().build()))
