"""`tttjax recipes` and `tttjax paths`."""

from tttjax.cli.main import main


def test_recipes_are_listed_with_their_number(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:3] == ["quickstart", "2", "recipes"] for line in lines)


def test_a_file_lists_its_recipes(capsys):
    assert main(["recipes", "quickstart"]) == 0
    assert capsys.readouterr().out.endswith("quickstart:ttt_e2e\nquickstart:window\n")


def test_a_recipe_has_command_cost_and_expected_loss(capsys):
    assert main(["recipes", "paper:3b,ttt_e2e,extend,128k,3x"]) == 0
    out = capsys.readouterr().out
    assert "--config=paper:3b,ttt_e2e,extend,128k,3x" in out
    assert "tokens:     8,178,892,800: 3,900 steps of 16 x 131072" in out
    assert "2.249 [V]" in out


def test_an_unknown_recipe_file_is_refused(capsys):
    assert main(["recipes", "papers"]) == 2
    assert "no recipe file 'papers'; choose from" in capsys.readouterr().err


def test_paths_mark_the_fast_weights(capsys):
    changes = ["--config.inner.fast_paths=suffix/**/mlp/w1"]
    assert main(["paths", "--config=quickstart:ttt_e2e", *changes]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[-1] for row in rows if row[0] == "fast"] == ["suffix/stage0/block0/mlp/w1"]
    assert ["2", "x", "64", "x", "128", "suffix/stage0/block0/fast_mlp/w1"] in rows
    assert rows[-1][1:4] == ["parameters,", "16,384", "of"]
