"""Preference tables of every form that the trainers read."""

import json

import pytest

from trainers.kernels.files.lines import TextError, decode, numbered
from trainers.preferences import tables as prism_pairs
from trainers.preferences.tables import Pair, PairsError, TableNotes, counts, of_scores, read, require_classes, with_files

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
        ("t.csv", "path_A,path_B,prompt,look\na,b,p,A\n", "found look: name those to use with --dimensions"),
        ("t.csv", "prompt,video,quality,seed\np,a,1,4\np,b,2,5\n", "found quality, seed: name those to use"),
        ("t.csv", "path_A,path_B,prompt,VQ,VQ\na,b,p,A,B\n", "two columns are called 'VQ'"),
        ("t.csv", "path_A,path_B,prompt,VQ\na,b,p,\nc,d,p,\n", "no pair; rows without any outcome, left out: line 2; line 3"),
        ("t.csv", "path_A,path_B,prompt,VQ\na,b,p,A" + "x" * 200000, "line 2: not a table of text"),
        ("t.jsonl", '{"prompt": null, "a": "x", "b": "y", "preference": "a"}', "line 1: TypeError prompt None is no text"),
        ("t.jsonl", '{"prompt": 7, "video": "x", "scores": {"q": 1}}', "line 1: TypeError prompt 7 is no text"),
        ("t.jsonl", "[" * 100000, "line 1: RecursionError"),
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
    with pytest.raises(PairsError, match="no dimension 'fun'; it has VQ, MQ, TA, Overall"):
        read(table, dimensions=["fun"])
    with pytest.raises(PairsError, match=r"no pair has two files that exist; 4 are missing, the first is .*1.mp4"):
        with_files(read(table), "t.csv", TableNotes())


def test_a_dimension_of_ties_alone_is_refused():
    pairs = of_scores([("p", "a", {"look": 1, "motion": 2}), ("p", "b", {"look": 1, "motion": 3})])
    with pytest.raises(PairsError, match="'look' every pair is a tie"):
        require_classes(pairs, "t.csv")
    require_classes([Pair(p.prompt, p.a, p.b, {"motion": p.outcome["motion"]}) for p in pairs], "t.csv")


def test_a_missing_file_loses_its_pairs_only(tmp_path):
    table = write(tmp_path / "t.csv", ALIGN)
    for name in ("a/1.mp4", "b/1.mp4", "a/2.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    notes = TableNotes()
    assert [p.prompt for p in with_files(read(table), "t.csv", notes)] == ["a cat, running"]
    assert notes.text() == [f"files that do not exist, whose pairs are left out: {tmp_path / 'b/2.mp4'}"]


@pytest.mark.parametrize("bad", ["N/A", "nan", "?", "AB"])
def test_a_bad_label_loses_its_cell_only(tmp_path, bad):
    text = ALIGN.replace("a dog,same,B,B,B", f"a dog,same,B,{bad},")
    notes = TableNotes()
    first, second = read(write(tmp_path / "t.csv", text), notes=notes)
    assert first.outcome == {"VQ": 1, "MQ": -1, "TA": 0, "Overall": 1}
    assert second.outcome == {"VQ": 0, "MQ": -1}
    assert notes.text() == [f"cells that are no label A, B or same, left out: line 3, TA '{bad}'"]
    assert counts([first, second]) == [
        "MQ: 2 decided, 0 ties", "Overall: 1 decided, 0 ties, 1 without", "TA: 0 decided, 1 ties, 1 without",
        "VQ: 1 decided, 1 ties",
    ]  # fmt: skip


@pytest.mark.parametrize("bad", ["nan", "inf", "1e999", "N/A", ""])
def test_a_bad_score_loses_its_cell_only(tmp_path, bad):
    notes = TableNotes()
    text = f"prompt,video,VQ,MQ\np,1,{bad},2\np,2,2,3\np,3,1,4\n"
    found = read(write(tmp_path / "t.csv", text), notes=notes)
    assert [p.outcome for p in found] == [{"MQ": -1}, {"MQ": -1}, {"VQ": 1, "MQ": -1}]
    assert notes.text() == ([f"cells that are no number, left out: line 2, VQ '{bad}'"] if bad else [])


def test_a_score_that_is_not_finite_is_no_tie(tmp_path):
    notes = TableNotes()
    rows = ['{"prompt": "p", "video": "1", "scores": {"q": 1}}', '{"prompt": "p", "video": "2", "scores": {"q": NaN, "r": 2}}']
    with pytest.raises(PairsError, match="contains no pair; scores that are no finite number, left out: line 2, q 'nan'"):
        read(write(tmp_path / "t.jsonl", "\n".join(rows)), notes=notes)


def test_columns_that_are_no_dimensions_are_named(tmp_path):
    notes = TableNotes()
    table = write(tmp_path / "t.csv", "prompt,video,VQ,seed,model\np,1,1,42,wan\np,2,2,43,wan\n")
    assert [p.outcome for p in read(table, notes=notes)] == [{"VQ": -1}]
    assert notes.text() == ["columns that are not used (name them with --dimensions to use them): seed"]
    assert [p.outcome for p in read(table, dimensions=["seed"])] == [{"seed": -1}]


def test_rows_that_compare_nothing_are_named(tmp_path):
    notes = TableNotes()
    rows = ["a,a,p,A", "a,b,p,", "a,b,,A", "a,b,p,A", "c,d", "a,b,a cat, running,A", "", "e,f,p,B"]
    found = read(write(tmp_path / "t.csv", "\n".join(["path_A,path_B,prompt,VQ", *rows])), notes=notes)
    assert [(p.a.name, p.outcome) for p in found] == [("a", {"VQ": 1}), ("e", {"VQ": -1})]
    assert notes.text() == [
        "rows of more than 4 cells (a cell that holds the separator must be quoted): line 7",
        "rows that compare a clip with itself, left out: line 2",
        "rows without any outcome, left out: line 3",
        "rows without a prompt or a clip, left out: line 4, prompt; line 6, prompt",
    ]
    lines = ['{"prompt": "p", "a": "x", "b": "y", "preference": {}}', '{"prompt": "p", "a": "x", "b": "y", "preference": "a"}']
    notes = TableNotes()
    assert len(read(write(tmp_path / "t.jsonl", "\n".join(lines)), notes=notes)) == 1
    assert notes.text() == ["rows without any outcome, left out: line 1"]
    assert prism_pairs.LABELS["same"] == 0


def test_only_the_first_places_are_listed():
    notes = TableNotes()
    for line in range(5):
        notes.leave_out("rows", f"line {line}")
    assert notes.text() == ["rows: line 0; line 1; line 2 and 2 more"]


@pytest.mark.parametrize("separator", [";", "\t", ","])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_separators_and_encodings(tmp_path, separator, encoding, end):
    quoted = '"two\nlines, and; more"'
    rows = [["path_A", "path_B", "prompt", "VQ"], ["a", "b", "ein Fu\u00dfball", "A"], ["c", "d", quoted, "B"]]
    (tmp_path / "t.csv").write_bytes((end.join(separator.join(r) for r in rows) + end).encode(encoding))
    found = read(tmp_path / "t.csv")
    assert [p.prompt for p in found] == ["ein Fu\u00dfball", "two\nlines, and; more"]
    row = json.dumps({"prompt": "\u00df", "a": "x", "b": "y", "preference": "a"}, ensure_ascii=False)
    (tmp_path / "t.jsonl").write_bytes((row + end).encode(encoding))
    assert read(tmp_path / "t.jsonl")[0].prompt == "\u00df"


def test_another_encoding_is_named(tmp_path):
    (tmp_path / "t.csv").write_bytes("path_A,path_B,prompt,VQ\na,b,\u96ea\u4e2d,A\n".encode("gbk"))
    with pytest.raises(TextError, match=r"t.csv, line 2: not text in UTF-8 \(.* at byte \d+\); save the file as UTF-8"):
        read(tmp_path / "t.csv")


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_a_line_ends_at_a_line_feed_alone(tmp_path, character):
    row = {"prompt": f"first{character}second", "a": "x", "b": "y", "preference": "a"}
    # JSON strings hold no control characters but as escapes.
    text = json.dumps(row, ensure_ascii=ord(character) < 32)
    assert read(write(tmp_path / "t.jsonl", text))[0].prompt == f"first{character}second"
    assert list(numbered(f"a{character}b\r\n\nc")) == [(1, f"a{character}b"), (3, "c")]
    assert decode(f"a{character}b".encode(), "x") == f"a{character}b"
