"""Preference tables of every form that the trainers read."""

import json

import pytest

from trainers.preferences import tables as prism_pairs
from trainers.preferences.tables import Pair, PairsError, of_scores, read, require_classes, require_files

ALIGN = """path_A,path_B,prompt,VQ,MQ,TA,Overall,fps_A,fps_B,num_frames_A,num_frames_B,A_model
a/1.mp4,b/1.mp4,"a cat, running",A,B,same,A,16,8,81,81,wan
a/2.mp4,b/2.mp4,a dog,same,B,B,B,16,8,81,81,wan
"""
FEEDBACK = """id,text prompt,video link,visual quality,dynamic degree
1,a cat,1.mp4,3,1
2,a cat,2.mp4,2,1
3,a dog,3.mp4,4,4
4,a cat,4.mp4,2,3
"""


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_videoaligns_table(tmp_path):
    found = read(write(tmp_path / "t.csv", ALIGN))
    assert found == [
        Pair("a cat, running", tmp_path / "a/1.mp4", tmp_path / "b/1.mp4", {"VQ": 1, "MQ": -1, "TA": 0, "Overall": 1}),
        Pair("a dog", tmp_path / "a/2.mp4", tmp_path / "b/2.mp4", {"VQ": 0, "MQ": -1, "TA": -1, "Overall": -1}),
    ]
    assert [p.outcome for p in read(tmp_path / "t.csv", dimensions=["MQ"])] == [{"MQ": -1}, {"MQ": -1}]
    assert read(tmp_path / "t.csv", root="/videos")[0].a.as_posix() == "/videos/a/1.mp4"


def test_score_rows_make_the_pairs_of_each_prompt(tmp_path):
    found = read(write(tmp_path / "t.csv", FEEDBACK))
    assert [(p.a.name, p.b.name, p.outcome) for p in found] == [
        ("1.mp4", "2.mp4", {"visual quality": 1, "dynamic degree": 0}),
        ("1.mp4", "4.mp4", {"visual quality": 1, "dynamic degree": -1}),
        ("2.mp4", "4.mp4", {"visual quality": 0, "dynamic degree": -1}),
    ]


def test_lines_of_json(tmp_path):
    rows = [
        {"prompt": "p", "a": "x.safetensors", "b": "y.safetensors", "preference": "b"},
        {"prompt": "p", "a": "x", "b": "y", "preference": {"motion": "tie", "look": "a"}},
        {"prompt": "q", "video": "1", "scores": {"look": 0.5}},
        {"prompt": "q", "video": "2", "scores": {"look": 0.25, "motion": 1}},
    ]
    found = read(write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n"))
    assert [p.outcome for p in found] == [{"overall": -1}, {"motion": 0, "look": 1}, {"look": 1}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", ALIGN.replace("path_B", "path"), "no column 'path_B'; found path_A, path"),
        ("t.csv", ALIGN.replace("prompt", "words"), "no column 'prompt'"),
        ("t.csv", "path_A,path_B,prompt,note\na,b,p,nice\n", "no column of labels"),
        ("t.csv", "prompt,score\np,1\n", "no column 'video'"),
        ("t.csv", "prompt,video,remark\np,1,nice\n", "no column of scores"),
        ("t.csv", ALIGN.splitlines()[0] + "\n", "contains no pair"),
        ("t.jsonl", '{"prompt": "p", "a": "x"}', "line 1: KeyError"),
        ("t.jsonl", '{"prompt": "p", "a": "x", "b": "y", "preference": "left"}', "line 1: KeyError 'left'"),
        ("t.jsonl", "not json", "line 1: JSONDecodeError"),
        ("t.txt", "", "expected a .csv or .jsonl"),
    ],
)
def test_bad_tables_are_named(tmp_path, name, text, message):
    with pytest.raises(PairsError, match=message) as caught:
        read(write(tmp_path / name, text))
    assert name in str(caught.value)


def test_a_missing_table_file_or_dimension_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.csv"):
        read(tmp_path / "gone.csv")
    table = write(tmp_path / "t.csv", ALIGN)
    with pytest.raises(PairsError, match="no dimension 'fun'; it has MQ, Overall, TA, VQ"):
        read(table, dimensions=["fun"])
    with pytest.raises(PairsError, match=r"lists 4 files that do not exist, the first is .*1.mp4"):
        require_files(read(table), "t.csv")


def test_a_dimension_of_ties_alone_is_refused():
    pairs = of_scores([("p", "a", {"look": 1, "motion": 2}), ("p", "b", {"look": 1, "motion": 3})])
    with pytest.raises(PairsError, match="'look' every pair is a tie"):
        require_classes(pairs, "t.csv")
    require_classes([Pair(p.prompt, p.a, p.b, {"motion": p.outcome["motion"]}) for p in pairs], "t.csv")


def test_nan_scores_are_no_scores(tmp_path):
    with pytest.raises(PairsError, match="no column of scores"):
        read(write(tmp_path / "t.csv", "prompt,video,look\np,1,nan\np,2,1\n"))
    assert prism_pairs.LABELS["same"] == 0
