"""Words that tell: the commonest English ones, and signs of mathematics and units that are in no language."""

from __future__ import annotations


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# The commonest words of English and of mathematics in English: they are never names.
COMMON_ENGLISH = _set(
    """
    a about above actually add after again all also an and another answer any are as assume at back be because been
    before below both but by calculate can case check compute consider could did different do does each else equal
    equals equation error example find finally first following for formula from get give given gives had has have he
    hence her here his hmm how however i if in instead into is it its just know last left less let like make maybe me
    means method minus mistake more most multiply must my need next no not note now number numbers of off ok okay on
    once one only or other our out over plus problem proof prove question remaining result right same second see set
    she should since so solution solve some step steps still substitute subtract such sum suppose take than that the
    their them then there therefore these they third this those three thus time times to together too total try two up
    us use using value verify wait want was way we were what when where whether which while who why will with would
    wrong yes yet you your
    """
)
# Those of them that are no words of another language: a sentence with a quarter of them is English.
PLAIN_ENGLISH = COMMON_ENGLISH - _set(
    """
    a all an are as at be because by can do error for formula from give had has have he her his i if in instead is it
    last like like man me means minus most must my no not note number of off ok okay on or over plus problem question
    see set she so solution still sum suppose take than then time times to too total two up us want was we will
    """
)
# Names of functions, units, and endings of numbers.
SIGNS = _set(
    """
    sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp lim max min sup inf mod gcd lcm det dim
    ker deg arg re im mm cm dm km kg mg ml kw mb gb tb kb hz ms ns am pm th st nd rd vs etc
    """
)
# Words of programming languages, which a line of code may consist of.
CODE_WORDS = _set(
    """
    if for in is not and or None True False return import from while else elif def class try except finally with as
    lambda print raise pass yield break continue global del assert async await int float str bool char double long void
    public private static final const let var function new this null true false end begin then do done fi echo switch
    case default struct enum using namespace include std SELECT FROM WHERE AND OR NOT GROUP ORDER BY JOIN ON INSERT INTO
    VALUES UPDATE SET DELETE CREATE TABLE AS LIMIT HAVING sudo apt pip npm git conda install
    """
)
