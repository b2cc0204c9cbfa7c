"""Twenty kinds of queries, as people would ask twenty adapters: the recipe of `routing.py`.

    a query = beginning + thing + ending        "Convert" + "5 miles" + "to metric units"

Six beginnings and six endings make 36 wordings of each kind. An adapter has seen 24 of them, with half of the things; it
is asked in the other 12, with the other half (new wordings). Ten more wordings of each kind were written apart, with
words of their own as far as that goes (other words). Two kinds are in Spanish, as the embedded base speaks it too.
"""

import random
from dataclasses import dataclass
from itertools import product
from typing import Literal

SEEN = 24  # of the 36 wordings


@dataclass(frozen=True)
class Skill:
    """A kind of query. `wordings` have {} where the thing goes."""

    name: str
    beginnings: tuple[str, ...]
    endings: tuple[str, ...]
    things: tuple[str, ...]
    wordings: tuple[str, ...]


def queries(
    skill: Skill, seed: int, n: int, kind: Literal["seen", "new wordings", "other words"]
) -> list[str]:
    """`n` different queries of the skill; which wordings and things are kept back is drawn by `seed`."""
    draw = random.Random(f"{skill.name} {seed}")
    pairs = [f"{begin} {{}}{end}" for begin, end in product(skill.beginnings, skill.endings)]
    things = list(skill.things)
    draw.shuffle(pairs)
    draw.shuffle(things)
    half = len(things) // 2
    wordings = {"seen": pairs[:SEEN], "new wordings": pairs[SEEN:], "other words": skill.wordings}[
        kind
    ]
    kept = things[:half] if kind == "seen" else things[half:]
    return draw.sample([wording.format(thing) for wording in wordings for thing in kept], n)


def _skill(name: str, beginnings: str, endings: str, things: str, *wordings: str) -> Skill:
    def cut(words: str) -> tuple[str, ...]:
        return tuple(word.strip() for word in words.split("|"))

    closed = (word if word[:1] in ("", ",", "?") else f" {word}" for word in cut(endings))
    return Skill(name, cut(beginnings), tuple(closed), cut(things), wordings)


SKILLS = (
    _skill(
        "to spanish",
        "Translate|How do you say|Put|Write|Say|Render",
        "into Spanish|in Spanish, please|for my friend in Madrid|as Spaniards would say it|to the language of Spain|, Spanish translation",
        "good morning|where is the station?|the cat sleeps on the chair|I lost my keys|we will arrive tomorrow|the water is cold|she bought a red dress|my brother plays the piano",
        "Translate into Spanish: {}",
        "How do you say '{}' in Spanish?",
        "Put this sentence into Spanish, please: {}",
        "What would a Spaniard say for: {}",
        'Spanish translation of "{}"',
        "I need this in Spanish: {}",
        "Could you turn '{}' into Spanish for my friend in Madrid?",
        "{} -- in Spanish?",
        "Give me the Spanish for {}",
        "My Spanish is poor. Help me to write: {}",
    ),
    _skill(
        "sentiment",
        "Is this positive or negative?|Classify the review:|What is the sentiment here?|Did the customer like it?|Judge the opinion:|Label this comment:",
        "|Answer good or bad.|Was the writer happy?|Positive, neutral or negative?|How does the customer feel?|One word for the tone.",
        "The film was a complete waste of time|I loved every minute of the play|The phone broke after two days|Best coffee in town|The service was slow and the waiter rude|A charming little hotel|The battery lasts forever, great buy|The book bored me",
        "Is this review positive or negative? {}",
        "What is the sentiment of: {}",
        "Classify the opinion as good or bad: {}",
        'Did this customer like it? "{}"',
        "Label the feeling of this comment: {}",
        "Happy or unhappy? {}",
        "Rate the tone of this review, positive, neutral or negative: {}",
        "A customer wrote: {}. Was the customer satisfied?",
        "Sentiment analysis: {}",
        "Tell me whether the writer is pleased: {}",
    ),
    _skill(
        "sum",
        "Solve this problem:|Calculate:|How much is it?|Work out|My homework in maths says|Do the arithmetic:",
        "|What is the result?|How many are left?|Give the number.|What is the total?|What does it come to?",
        "3 boxes with 12 apples each, 5 are eaten|a train that goes 60 km in one hour and travels 4 hours|7 friends who share 84 euros|a shirt of 20 dollars with 15% off|24 pupils in 4 equal groups|a garden of 8 by 12 metres|9 bags of 14 marbles, 6 lost|45 minutes a day for 6 days",
        "Solve this word problem: {}. What is the result?",
        "Calculate step by step: {}",
        "How much is it altogether? {}",
        "Work out the answer: {}",
        "My homework in maths: {}. Which number comes out?",
        "{}. How many are left or due in the end?",
        "Do the arithmetic for me: {}",
        "Compute the total for {}",
        "Here is a sum to solve: {}",
        "What number do I get? {}",
    ),
    _skill(
        "sql",
        "Write an SQL query for|SELECT|Give me SQL that lists|How do I query|Fetch from the database|I need a query for",
        "|in PostgreSQL|from the table|with a join|using MySQL|, in SQL please",
        "customers from Berlin|orders above 100 euros|the ten newest users|products without a price|average salary by department|employees hired in 2020|duplicate e-mail addresses|sales by month",
        "Write an SQL query for {}",
        "SELECT statement that returns {}",
        "How do I query the database for {}?",
        "Give me SQL to list {}",
        "From my PostgreSQL table I want {}",
        "Which SQL shows {}?",
        "Query: {} from the tables, with a join if needed",
        "I have a MySQL database. Fetch {}",
        "Turn this into SQL: {}",
        "A database query that finds {}, please",
    ),
    _skill(
        "python",
        "Write a Python function that|Python code which|Implement something that|Code a helper that|I need a script that|Show me a function that",
        "|in Python|, with a docstring|using Python 3|, def and return|without libraries",
        "reverses a list|counts the words of a text|checks whether a number is prime|reads a CSV file|removes duplicates from a list|computes the factorial|sorts a dictionary by value|merges two dictionaries",
        "Write a Python function that {}",
        "Python code which {}",
        "Implement in Python something that {}",
        "def f(): a function that {}",
        "How would you program in Python a method that {}?",
        "Give me a short Python script that {}",
        "I need code in Python: it {}",
        "Code a helper in python that {}",
        "Show me a Python snippet that {}",
        "Complete the Python function; it {}",
    ),
    _skill(
        "recipe",
        "Give me a recipe for|How do I cook|What are the ingredients of|I want to make|Teach me to prepare|How is this made:",
        "|for four people|at home|in the oven|for dinner|with few ingredients",
        "lentil soup|apple pie|chicken curry|pancakes|potato salad|tomato sauce|chocolate cake|fried rice",
        "Give me a recipe for {}",
        "How do I cook {}?",
        "What ingredients do I need for {}?",
        "I want to make {} for dinner, what are the steps?",
        "Tell me how to prepare {} at home",
        "How long does {} stay in the oven or the pot?",
        "Recipe: {} for four people",
        "My guests love {}. How is it made?",
        "Teach me to bake or cook {}",
        "An easy {} with few ingredients, please",
    ),
    _skill(
        "poem",
        "Write a poem about|Compose verses on|A haiku about|Make a rhyme on|A sonnet about|Sing of",
        "|in four lines|that rhymes|, as a poet would|with a sad tone, in verse|, a stanza or two",
        "the sea in winter|an old clock|my grandmother's garden|the first snow|a lost letter|the moon|a sleeping dog|autumn leaves",
        "Write a poem about {}",
        "Compose four verses on {}",
        "A haiku about {}",
        "Make up a rhyme on the subject of {}",
        "I would like a sonnet about {}",
        "Sing of {} in verse",
        "Give me some poetry on {}",
        "Rhyming lines about {}, please",
        "Be a poet: {}",
        "A short ballad of {}",
    ),
    _skill(
        "mail",
        "Write an e-mail saying|Draft a letter saying|Compose a message:|Help me to write politely|Reply to my boss|Tell the client by mail",
        "|, formal and polite|, with a subject line|, best regards|, to my manager|, dear Sir or Madam",
        "that I am ill and cannot come on Monday|that the invoice is late|that we accept the offer|that the meeting is moved to Friday|that I need two days off|that the parcel has not arrived|that the project is done|that I want a refund",
        "Write a polite e-mail to my boss saying {}",
        "Draft an email telling a client {}",
        "Help me to write a formal letter saying {}",
        "Compose a message to a colleague: {}",
        "Dear Sir or Madam... go on: {}",
        "An e-mail to the company that explains {}",
        "Email subject and body, to tell them {}",
        "How can I write to my manager {}?",
        "Reply to this mail, say {}",
        "Put into a courteous letter {}",
    ),
    _skill(
        "summary",
        "Summarise|Give the main points of|Make a summary of|Shorten|What are the key ideas of|Condense",
        "|in two sentences|in brief|, TL;DR|to one paragraph|as a short abstract",
        "a long article on bees and farming|the report of the city council|the history of the railway|a paper about sleep|the minutes of our meeting|a chapter on volcanoes|news of the election|an essay on friendship",
        "Summarise {}",
        "Give the main points of {}",
        "In two sentences, what does this say: {}",
        "Make a short summary of {}",
        "TL;DR of {}",
        "Shorten this text to its essence: {}",
        "What are the key ideas of {}?",
        "Write an abstract of {}",
        "Condense {} to one paragraph",
        "I have no time to read {}; what is in it?",
    ),
    _skill(
        "grammar",
        "Correct:|Fix the grammar of|Is this correct English?|Proofread|Find the mistakes in|Rewrite without errors:",
        "|, check my English|and explain the mistake|, spelling too|in proper English|, what is wrong?",
        "he go to school every days|she dont like apples|I has two brother|they was happy yesterday|we is late for the bus|the childs plays outside|him and me goes home|there is many car",
        "Correct the mistakes: {}",
        "Fix the grammar of this sentence: {}",
        "Is this correct English? {}",
        "Proofread: {}",
        "Rewrite without errors: {}",
        'Find the mistakes in "{}"',
        "Please check my English: {}",
        "What is wrong with this sentence: {}",
        "Correct my spelling and grammar: {}",
        "Make this sentence right: {}",
    ),
    _skill(
        "travel",
        "Plan a trip to|What should I see in|An itinerary for|Where can I stay in|I am going on holiday to|Best sights of",
        "|for three days|next summer|with hotels|, tips for tourists|on my vacation",
        "Lisbon|Japan|the Alps|Rome|Scotland|Peru|Istanbul|Norway",
        "Plan a trip of three days to {}",
        "What should I see in {}?",
        "An itinerary for a week in {}",
        "Where can I stay in {}?",
        "I am going on holiday to {}. Any tips?",
        "Best time to visit {}?",
        "Which sights in {} are worth the journey?",
        "How do tourists get around in {}?",
        "Travel guide for {}",
        "Make me a plan for my vacation in {}",
    ),
    _skill(
        "health",
        "I have|What helps against|What can cause|Should I see a doctor about|Which medicine is there for|My child suffers from",
        "|since yesterday|, is it dangerous?|and I feel ill|, any remedies?|, what treatment?",
        "a headache|a sore throat|back pain|a fever|a cough|a swollen ankle|an itchy rash|stomach ache",
        "I have {}. What should I do?",
        "What can cause {}?",
        "Is {} dangerous? Should I see a doctor?",
        "Which medicine helps against {}?",
        "Home remedies for {}",
        "My child has had {} since yesterday",
        "How long does {} last?",
        "Symptoms: {}. What illness could that be?",
        "The patient complains of {}",
        "How is {} treated?",
    ),
    _skill(
        "units",
        "Convert|How much is|What are|Express|Change|Give the equivalent of",
        "|to metric units|in kilometres or kilos|in other units|, unit conversion|in Celsius, litres or metres",
        "5 miles|70 kilograms|100 degrees Fahrenheit|3 gallons|12 inches|2 acres|250 grams|30 ounces",
        "Convert {} to metric or back",
        "How much is {} in other units?",
        "{} in SI units?",
        "What are {} in kilometres, kilos, litres or Celsius?",
        "Unit conversion: {}",
        "Express {} in the other system of measurement",
        "I only know metric. What is {}?",
        "Change {} into the unit used in Europe",
        "{} equals how many of the other unit?",
        "Give the metric equivalent of {}",
    ),
    _skill(
        "shell",
        "Which Linux command|Bash line that|Shell script that|In the terminal, what|Give me a command which|What do I type? It",
        "|on Ubuntu|with grep or find|in bash|from the command line|in one line of shell",
        "finds the largest files|counts the lines of all files|kills a process by its port|renames many files|shows free disk space|compresses a folder|copies files to a server|follows a log file",
        "Which Linux command {}?",
        "Bash one-liner that {}",
        "In the terminal, what {}?",
        "Write a shell script that {}",
        "Command line on Ubuntu that {}",
        "Give me the bash command which {}",
        "With find, grep, awk or the like: something that {}",
        "I am on Linux. What do I type? It {}",
        "A shell command, please: it {}",
        "sh: one line that {}",
    ),
    _skill(
        "story",
        "Tell me a story about|Write a fairy tale of|A bedtime story with|Once upon a time there was|Invent an adventure of|Begin a tale about",
        "|for my daughter|, for children|with a happy end|before they sleep|, long ago and far away",
        "a brave mouse|a dragon who is afraid of fire|two lost children|a talking tree|a king without a crown|a little robot|a girl who could fly|an honest thief",
        "Tell me a story about {}",
        "Write a fairy tale of {}",
        "A bedtime story with {}",
        "Once upon a time there was {}. Go on.",
        "Make up a short tale: {}",
        "Begin a novel whose hero is {}",
        "My daughter wants to hear of {} before she sleeps",
        "Invent an adventure of {}",
        "Write the first page of a story on {}",
        "Tell the children about {}",
    ),
    _skill(
        "contract",
        "Draft a clause in case|What does the law say when|Contract wording if|Who is liable when|Write the paragraph for when|Is there a penalty if",
        "|, in legal terms|under the agreement|, as a lawyer|according to the contract|, terms and conditions",
        "the tenant pays late|the work is not finished on time|a partner leaves the company|the goods arrive damaged|confidential data is disclosed|the employee resigns|the buyer cancels|the lease ends early",
        "Draft a clause in case {}",
        "What does the law say when {}?",
        "Legal wording of a contract for when {}",
        "As a lawyer: what happens if {}?",
        "Write the paragraph of an agreement that applies if {}",
        "Who is liable when {}?",
        "Terms and conditions, should it be that {}",
        "Is there a penalty under the contract if {}?",
        "A legal provision for the case that {}",
        "Our lawyer asks for a section on what follows if {}",
    ),
    _skill(
        "capital",
        "What is the capital of|Name the capital of|Which city is the capital of|Geography: capital city of|Do you know the capital of|Tell me the seat of government of",
        "|?|, which city?|, on the map|, geography quiz|and its name",
        "France|Australia|Kenya|Brazil|Canada|Mongolia|Egypt|Finland",
        "What is the capital of {}?",
        "Name the capital city of {}",
        "Which city is the seat of government of {}?",
        "Capital of {}?",
        "Geography quiz: the capital of {}",
        "In which city does the parliament of {} sit?",
        "Do you know the capital of {}?",
        "{}: capital?",
        "Tell me the name of the capital of {}",
        "Which town is {}'s capital?",
    ),
    _skill(
        "json",
        "Extract as JSON:|Return a JSON object for|Parse into JSON:|Make JSON out of|Fill the fields from|Convert to JSON:",
        "|, keys and values|as a dictionary|, machine-readable|with names and dates|in JSON",
        "Ana Ruiz, 34, lives in Sevilla|Tom Hill, born 1980, plumber|Mary Stone, phone 555 0101|Order 17: two lamps, 40 euros|Flight LH123 from Munich at 9:40|Dr. Kim, room 12, Tuesdays|Invoice 88 of 3 May, 120 euros|Peter Lang, Vienna, teacher",
        "Extract the fields as JSON: {}",
        "Return a JSON object with the data in: {}",
        "Parse this record into JSON: {}",
        "Which names, dates and numbers are in this? Answer in JSON. {}",
        "{} -> JSON",
        "Structured output (keys and values) for: {}",
        "Make JSON out of this line: {}",
        'Find the entities in "{}" and give them as a JSON dictionary',
        "Fill a JSON form from: {}",
        "Convert the text to machine-readable JSON: {}",
    ),
    _skill(
        "el tiempo",
        "¿Qué tiempo hará en|¿Va a llover en|Dime la temperatura en|Pronóstico para|¿Hace frío en|¿Necesito paraguas en",
        "|mañana?|hoy?|esta semana?|el domingo?|, con lluvia o sol?",
        "Madrid|Bogotá|la costa|el norte|Valencia|la montaña|Buenos Aires|mi ciudad",
        "¿Qué tiempo hará mañana en {}?",
        "¿Va a llover hoy en {}?",
        "Dime la temperatura en {}",
        "Pronóstico del tiempo para {}",
        "¿Hace frío en {} esta semana?",
        "¿Necesito paraguas en {}?",
        "¿Habrá nieve en {} el domingo?",
        "El clima de {} para el fin de semana",
        "¿Cuántos grados hay en {}?",
        "¿Sopla mucho viento en {}?",
    ),
    _skill(
        "carta",
        "Escribe una carta diciendo|Redacta un correo:|Ayúdame a escribir|Prepara un mensaje:|Necesito una nota diciendo|Escribe a la empresa",
        "|, muy formal|, con un saludo|para mi jefe|a un cliente|, estimado señor",
        "que no puedo ir a la reunión|que acepto el trabajo|que la factura está mal|que quiero anular el pedido|que llegaré tarde|que busco un piso|que me mudo en junio|que agradezco su ayuda",
        "Escribe una carta formal diciendo {}",
        "Redacta un correo para mi jefe: {}",
        "Ayúdame a escribir un mensaje educado que diga {}",
        "Estimado señor: {}. Continúa la carta.",
        "Necesito una nota para la empresa, explicando {}",
        "¿Cómo le escribo a un cliente {}?",
        "Un correo electrónico breve, para decir {}",
        "Prepara una respuesta cortés: {}",
        "Carta al director: {}",
        "Pon en lenguaje formal {}",
    ),
)
