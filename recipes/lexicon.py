"""The words of the demo's little world, in English and Spanish side by side.

Written for this project. One line a word; a slash gives an irregular plural. Both the recipe of the
embedded base and the demo's correction task draw their sentences from here, so that what the demo holds
out of its training set is still a word that the base has read.
"""

from collections.abc import Callable
from dataclasses import dataclass

# English, Spanish, gender of the Spanish noun
PERSONS = """
baker panadero m | teacher maestra f | doctor médico m | farmer granjero m | actress actriz/actrices f
sailor marinero m | painter pintora f | king rey/reyes m | queen reina f | nurse enfermera f
soldier soldado m | child/children niño m | girl chica f | boy chico m | woman/women mujer f
man/men hombre m | student alumna f | writer escritor m | cook cocinero m | neighbour vecina f
friend amigo m | hunter cazador m | dancer bailarina f | mayor alcalde m | lawyer abogada f
carpenter carpintero m | inventor inventor/inventores m | aunt tía f | uncle tío m | grandmother abuela f
grandfather abuelo m | brother hermano m | sister hermana f | guest invitado m | thief/thieves ladrón/ladrones m
gardener jardinera f | driver conductor m | princess princesa f | prince príncipe m | tailor sastre m
"""
ANIMALS = """
dog perro m | cat gato m | horse caballo m | cow vaca f | hen gallina f | wolf/wolves lobo m | fox zorro m
mouse/mice ratón/ratones m | bird pájaro m | frog rana f | bear oso m | lion león/leones m | duck pato m
pig cerdo m | goat cabra f | rabbit conejo m | monkey mono m | turtle tortuga f | owl búho m | donkey burro m
"""
THINGS = """
house casa f | book libro m | table mesa f | chair silla f | door puerta f | window ventana f | boat barco m
letter carta f | lamp lámpara f | clock reloj/relojes m | key llave f | box caja f | cup taza f | plate plato m
knife/knives cuchillo m | spoon cuchara f | hat sombrero m | shirt camisa f | shoe zapato m | coat abrigo m
ring anillo m | coin moneda f | basket cesta f | bottle botella f | mirror espejo m | bed cama f
picture cuadro m | guitar guitarra f | drum tambor/tambores m | flower flor/flores f | tree árbol/árboles m | stone piedra f
rope cuerda f | wheel rueda f | car coche m | ball pelota f | doll muñeca f | flag bandera f | map mapa m
pencil lápiz/lápices m | notebook cuaderno m | bag bolsa f | umbrella paraguas/paraguas m | candle vela f | blanket manta f
hammer martillo m | bell campana f | sword espada f | shield escudo m | crown corona f | bridge puente m | wall muro m
tower torre f | bicycle bicicleta f | toy juguete m | kite cometa f | ladder escalera f | engine motor/motores m
axe hacha f | oven horno m
"""
FOODS = """
apple manzana f | orange naranja f | cheese queso m | egg huevo m | cake pastel/pasteles m | onion cebolla f | tomato/tomatoes tomate m
potato/potatoes patata f | pear pera f | lemon limón/limones m | grape uva f | biscuit galleta f | sandwich bocadillo m
carrot zanahoria f | strawberry/strawberries fresa f | melon melón/melones m | peach melocotón/melocotones m | soup sopa f
salad ensalada f | sausage salchicha f
"""
PLACES = """
garden jardín/jardines m | kitchen cocina f | market mercado m | school escuela f | forest bosque m | village pueblo m
city/cities ciudad f | church iglesia f | square plaza f | street calle f | beach playa f | castle castillo m
park parque m | river río m | mountain montaña f | shop tienda f | station estación/estaciones f | field campo m
library/libraries biblioteca f | harbour puerto m
"""
# English, Spanish masculine singular (the rest by rule; a slash gives an irregular feminine)
ADJECTIVES = """
red rojo | white blanco | black negro | yellow amarillo | green verde | blue azul | grey gris | big grande
small pequeño | old viejo | new nuevo | pretty bonito | ugly feo | clean limpio | dirty sucio | tall alto
short bajo | fat gordo | thin delgado | happy contento | sad triste | tired cansado | strong fuerte | weak débil
rich rico | poor pobre | quick rápido | slow lento | brave valiente | kind amable | cheap barato | expensive caro
heavy pesado | light ligero | round redondo | long largo | strange extraño | quiet tranquilo | famous famoso
young joven/joven/jóvenes/jóvenes | empty vacío | full lleno | broken roto | soft blando | hard duro | golden dorado
"""
# English present, past; Spanish present singular, plural, past singular, plural
THING_VERBS = """
see saw ve ven vio vieron | find found encuentra encuentran encontró encontraron | want wanted quiere quieren quiso quisieron
paint painted pinta pintan pintó pintaron | draw drew dibuja dibujan dibujó dibujaron | carry carried lleva llevan llevó llevaron
buy bought compra compran compró compraron | sell sold vende venden vendió vendieron | lose lost pierde pierden perdió perdieron
hide hid esconde esconden escondió escondieron | clean cleaned limpia limpian limpió limpiaron | wash washed lava lavan lavó lavaron
break broke rompe rompen rompió rompieron | touch touched toca tocan tocó tocaron | need needed necesita necesitan necesitó necesitaron
keep kept guarda guardan guardó guardaron | move moved mueve mueven movió movieron | steal stole roba roban robó robaron
use used usa usan usó usaron | watch watched mira miran miró miraron | count counted cuenta cuentan contó contaron
remember remembered recuerda recuerdan recordó recordaron | choose chose elige eligen eligió eligieron
repair repaired repara reparan reparó repararon | forget forgot olvida olvidan olvidó olvidaron | send sent envía envían envió enviaron
"""
FOOD_VERBS = """
eat ate come comen comió comieron | cook cooked cocina cocinan cocinó cocinaron | taste tasted prueba prueban probó probaron
cut cut corta cortan cortó cortaron | share shared comparte comparten compartió compartieron | prepare prepared prepara preparan preparó prepararon
"""
INTRANSITIVE = """
sleep slept duerme duermen durmió durmieron | run ran corre corren corrió corrieron | sing sang canta cantan cantó cantaron
dance danced baila bailan bailó bailaron | work worked trabaja trabajan trabajó trabajaron | walk walked camina caminan caminó caminaron
laugh laughed ríe ríen rió rieron | cry cried llora lloran lloró lloraron | play played juega juegan jugó jugaron
swim swam nada nadan nadó nadaron | jump jumped salta saltan saltó saltaron | wait waited espera esperan esperó esperaron
rest rested descansa descansan descansó descansaron | fall fell cae caen cayó cayeron | live lived vive viven vivió vivieron
shout shouted grita gritan gritó gritaron | dream dreamed sueña sueñan soñó soñaron | study studied estudia estudian estudió estudiaron
"""
TIMES = (
    ("today", "hoy"),
    ("every day", "cada día"),
    ("in the morning", "por la mañana"),
    ("at night", "por la noche"),
    ("again", "otra vez"),
    ("on Sunday", "el domingo"),
)
OPPOSITES = (
    "big small | old new | pretty ugly | clean dirty | tall short | fat thin | happy sad | strong weak | rich poor | "
    "quick slow | cheap expensive | heavy light | black white | empty full | soft hard"
)
LANGUAGES = ("en", "es")


@dataclass(frozen=True)
class Noun:
    """A noun in both languages; the gender is that of the Spanish word."""

    en: tuple[str, str]  # singular, plural
    es: tuple[str, str]
    feminine: bool

    def form(self, language: str, plural: bool) -> str:
        """The word as written in `language`."""
        return getattr(self, language)[int(plural)]


@dataclass(frozen=True)
class Adjective:
    """An adjective: one English form, four Spanish ones."""

    en: str
    es: tuple[str, str, str, str]  # masculine, feminine, masculine plural, feminine plural

    def form(self, language: str, plural: bool, feminine: bool) -> str:
        """The word as written in `language`, agreeing where the language asks for it."""
        return self.en if language == "en" else self.es[2 * int(plural) + int(feminine)]


@dataclass(frozen=True)
class Verb:
    """A verb in the third person, present and past."""

    en: tuple[str, str, str]  # plural present, singular present, past
    es: tuple[str, str, str, str]  # present singular, plural, past singular, plural

    def form(self, language: str, plural: bool, past: bool) -> str:
        """The word as written in `language`, agreeing with its subject."""
        if language == "en":
            return self.en[2] if past else self.en[0 if plural else 1]
        return self.es[2 * int(past) + int(plural)]


def _english_s(word: str) -> str:
    """The regular English -s: plural of a noun, third person of a verb."""
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "sh", "ch", "x")) else "s")


def _spanish_plural(word: str) -> str:
    """The regular Spanish plural (words that shift an accent are written out in the tables)."""
    if word.endswith("z"):
        return word[:-1] + "ces"
    return word + ("s" if word[-1] in "aeiouéáíó" else "es")


def _entries(table: str) -> list[list[str]]:
    return [
        entry.split()
        for line in table.strip().splitlines()
        for entry in line.split("|")
        if entry.strip()
    ]


def _pair(text: str, plural: Callable[[str], str]) -> tuple[str, str]:
    one, _, many = text.partition("/")
    return one, many or plural(one)


def _nouns(table: str) -> tuple[Noun, ...]:
    return tuple(
        Noun(_pair(en, _english_s), _pair(es, _spanish_plural), gender == "f")
        for en, es, gender in _entries(table)
    )


def _adjective(en: str, es: str) -> Adjective:
    if "/" in es:
        masculine, feminine, masculines, feminines = es.split("/")
        return Adjective(en, (masculine, feminine, masculines, feminines))
    feminine = es[:-1] + "a" if es.endswith("o") else es
    return Adjective(en, (es, feminine, _spanish_plural(es), _spanish_plural(feminine)))


def _verbs(table: str) -> tuple[Verb, ...]:
    return tuple(
        Verb((now, _english_s(now), past), (one, many, one_past, many_past))
        for now, past, one, many, one_past, many_past in _entries(table)
    )


persons, animals, things = _nouns(PERSONS), _nouns(ANIMALS), _nouns(THINGS)
foods, places = _nouns(FOODS), _nouns(PLACES)
adjectives = tuple(_adjective(*entry) for entry in _entries(ADJECTIVES))
thing_verbs, food_verbs, intransitive = (
    _verbs(THING_VERBS),
    _verbs(FOOD_VERBS),
    _verbs(INTRANSITIVE),
)
_by_english = {adjective.en: adjective for adjective in adjectives}
opposites = tuple((_by_english[a], _by_english[b]) for a, b in _entries(OPPOSITES))
