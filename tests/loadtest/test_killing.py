from loadtest.killing import describe_kills


def test_wrong_states_are_a_figure_and_random_moments_no_place():
    report = {
        "kills": 27,
        "wrong_states": 2,
        "places": [
            {"place": "before rename", "kills": 12},
            {"place": "after rename", "kills": 10},
            {"place": "any moment", "kills": 5},
        ],
    }
    found = {key: figure.value for key, figure in describe_kills(report).items()}
    assert found == {
        "kill.places": 2,
        "kill.fewest_kills_at_a_place": 10,
        "kill.kills": 27,
        "kill.wrong_states": 2,
    }
