import re
import xml.etree.ElementTree as ET

from ganomaly.runs.charts import curves_svg as svg
from ganomaly.runs.charts import read_curve as read


def test_a_curve_is_read_back(tmp_path):
    path = tmp_path / "curve.csv"
    path.write_text("step,latent,feature\n10,0.5,0.25\n20,0.75,1\n")
    assert read(path) == {"latent": {10: 0.5, 20: 0.75}, "feature": {10: 0.25, 20: 1.0}}
    path.write_text("")
    assert read(path) == {}


def lines(picture: str, kind: str) -> list[list[tuple[float, float]]]:
    paths = re.findall(rf'<path stroke="[^"]+" class="{kind}" d="M([^"h]+)"/>', picture)
    return [[tuple(map(float, at.split(","))) for at in path.split()] for path in paths]


def test_a_line_a_seed_and_one_of_their_mean():
    seeds = [{"latent": {10: 0.6, 20: 0.8}}, {"latent": {10: 0.8, 20: 1.0}}]
    picture = svg("try & see", {"a<b": seeds, "c": [{"latent": {20: 0.5}}]})
    root = ET.fromstring(picture)  # names are escaped
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert "try & see" in texts and "a<b, AUROC by step" in texts and "latent" in texts
    thin, thick = lines(picture, "seed"), lines(picture, "mean")
    assert len(thin) == 2 and len(thick) == 2
    for a, b, mean in zip(*thin, thick[0]):
        assert abs((a[1] + b[1]) / 2 - mean[1]) <= 0.11 and a[0] == b[0] == mean[0]
    assert thick[0][1][1] < thick[0][0][1]  # a better one is higher up
    assert thin[1][1] == (280.0, 0.0)  # the last step, an AUROC of 1


def test_a_figure_under_a_half_stays_inside_its_panel():
    thick = lines(svg("x", {"c": [{"latent": {1: 0.123, 2: 0.9}}]}), "mean")
    assert 0 <= min(y for _, y in thick[0]) and max(y for _, y in thick[0]) <= 180
