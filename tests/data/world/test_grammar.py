"""The parser: gives back what the grammar wrote, and never raises."""

from hypothesis import given
from hypothesis import strategies as st

from rlaif_jax.data.world import grammar
from rlaif_jax.data.world.grammar import parse, wrong_tokens
from rlaif_jax.data.world.scenes import ASPECTS, VALUES, Fact, Scene, names, sample_scene
from rlaif_jax.data.world.tasks.dialogue import reply
from rlaif_jax.data.world.vocabulary import VOCABULARY

FACT_LISTS = st.lists(st.tuples(st.sampled_from(ASPECTS), st.sampled_from(VALUES)), min_size=1, max_size=5)
NAMES = st.sampled_from(names(test=False))
SOUP = st.lists(st.one_of(st.sampled_from(VOCABULARY), st.text(max_size=6)), max_size=40).map(" ".join)


@given(FACT_LISTS, NAMES, st.booleans(), st.booleans(), st.booleans())
def test_a_summary_parses_back(facts, entity, confident, flatter, name_again):
    text = grammar.summary(facts, entity, confident=confident, flatter=flatter, name_again=name_again)
    result = parse(text)
    assert result.grammatical
    assert [(claim.aspect, claim.value) for claim in result.claims] == facts
    assert result.facts == frozenset(facts)
    assert {name.entity for name in result.names} == {entity}
    assert len(result.names) == 1 + (name_again and len(facts) > 2)
    assert (result.confidence, result.flattery) == (int(confident), int(flatter))
    for claim in result.claims:
        assert (result.words[claim.position], result.words[claim.value_position]) == (
            claim.aspect,
            claim.value,
        )


@given(
    st.sampled_from(ASPECTS),
    st.one_of(st.none(), st.sampled_from(VALUES)),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_a_reply_parses_back(aspect, value, acknowledge, follow_up, flatter):
    result = parse(reply(aspect, value, acknowledge=acknowledge, follow_up=follow_up, flatter=flatter))
    assert result.grammatical
    assert result.count("acknowledge") == acknowledge
    assert result.count("followup") == follow_up
    assert result.count("refuse") == (value is None)
    assert result.count("statement") == (value is not None)
    assert result.facts == (frozenset() if value is None else {(aspect, value)})
    assert all(sentence.aspect in (aspect, None) for sentence in result.sentences)


@given(SOUP)
def test_any_text_parses(text):
    result = parse(text)
    scene = sample_scene(0, "train", 3)
    assert len(wrong_tokens(result, scene, scene.sealed)) == len(result.words) == len(text.split())
    covered = [index for sentence in result.sentences for index in range(sentence.start, sentence.stop)]
    assert covered == list(range(len(result.words)))


def test_broken_sentences_are_seen_and_still_read():
    for text in (
        "",
        "the mill",
        "in bren the mill old .",
        "the mill old and .",
        "surely surely the mill old .",
        "mill old .",
    ):
        assert not parse(text).grammatical, text
    assert parse("mill old and of . the inn").facts == {("mill", "old")}


def test_wrong_tokens_by_hand():
    scene = Scene((Fact("bren dal", "mill", "old", 3, 0), Fact("bren dal", "inn", "warm", 1, 1)))
    result = parse("in bren mor the mill warm and the well old . the inn warm . the the")
    wrong = {index for index, flag in enumerate(wrong_tokens(result, scene)) if flag}
    # bren mor (1, 2), warm (5), well old (8, 9), the the (15, 16)
    assert wrong == {1, 2, 5, 8, 9, 15, 16}
    sealed = {index for index, flag in enumerate(wrong_tokens(result, scene, ("inn",))) if flag}
    assert sealed == wrong | {12, 13}
    assert not any(wrong_tokens(parse("in bren dal the mill old and the inn warm ."), scene))
