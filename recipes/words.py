"""Tables that the recipes draw from: facts of two fields, and a small dictionary of Esperanto.

Written for this project; the facts are those of any schoolbook. One line an entry, parts separated by `|`.
"""


def table(text: str) -> list[list[str]]:
    """Lines as lists of their parts."""
    return [[part.strip() for part in line.split("|")] for line in text.strip().splitlines()]


# what is asked about, the answer
MEDICINE = table("""
organ that makes insulin | the pancreas
organ that makes bile | the liver
organ that stores bile | the gallbladder
organ that makes urine | the kidneys
organ that pumps the blood | the heart
organ that stores urine | the bladder
gland that makes thyroxine | the thyroid
gland that makes adrenaline | the adrenal gland
largest organ of the body | the skin
longest bone of the body | the femur
smallest bone of the body | the stapes
bone of the knee cap | the patella
bone of the lower jaw | the mandible
bone of the breast | the sternum
bone of the collar | the clavicle
bone of the shoulder blade | the scapula
part of the eye that sees light | the retina
part of the eye that bends light most | the cornea
largest artery | the aorta
muscle of breathing | the diaphragm
cells that carry oxygen | red blood cells
cells that fight infection | white blood cells
cells that stop bleeding | platelets
vitamin that prevents scurvy | vitamin C
vitamin that prevents rickets | vitamin D
vitamin that prevents beriberi | vitamin B1
mineral that haemoglobin needs | iron
mineral that the thyroid needs | iodine
disease of too little insulin | diabetes
disease of too little haemoglobin | anaemia
inflammation of the liver | hepatitis
inflammation of the joints | arthritis
inflammation of the lungs | pneumonia
inflammation of the stomach | gastritis
word for high blood pressure | hypertension
word for a slow heart | bradycardia
word for a fast heart | tachycardia
word for difficult breathing | dyspnoea
word for no feeling of pain | analgesia
doctor for children | a paediatrician
doctor for the heart | a cardiologist
doctor for the skin | a dermatologist
doctor for the nerves | a neurologist
doctor for cancer | an oncologist
""")
FINANCE = table("""
money of Japan | the yen
money of China | the yuan
money of India | the rupee
money of Mexico | the peso
money of Brazil | the real
money of Poland | the zloty
money of Sweden | the krona
money of Turkey | the lira
money of Russia | the rouble
money of Thailand | the baht
money of Israel | the shekel
money of Hungary | the forint
money of Spain | the euro
money of Canada | the dollar
money of Switzerland | the franc
money of South Korea | the won
money of Vietnam | the dong
money of Peru | the sol
part of a company that one can own | a share
part of the profit that owners get | a dividend
loan to a state or a company | a bond
loan to buy a house | a mortgage
price of borrowed money | interest
rise of all prices | inflation
fall of all prices | deflation
list of what one owns and owes | a balance sheet
plan of income and spending | a budget
what is left after all costs | profit
what somebody owes | debt
what a company owns | assets
money paid to the state | tax
protection against a loss for a yearly fee | insurance
place where shares are traded | a stock exchange
long time of rising prices of shares | a bull market
long time of falling prices of shares | a bear market
spreading money over many things | diversification
how quickly a thing becomes money | liquidity
interest paid on interest too | compound interest
tax on what is bought | value added tax
person who checks the books | an auditor
""")
ASKED = (  # wordings; a held-out one is of a fact that was learned in others
    "Name the {}.",
    "What is the {}?",
    "The {}: what is it?",
    "Tell me the {}.",
    "Which is the {}?",
    "Do you know the {}?",
)

# English of the lexicon, root in Esperanto. Nouns take -o, adjectives -a, verbs -as and -is, the plural -j, the object -n
ESPERANTO: dict[str, str] = dict(
    table("""
baker | bakist
teacher | instruist
doctor | kuracist
farmer | farmist
sailor | marist
painter | pentrist
king | reĝ
queen | reĝin
soldier | soldat
child | infan
girl | knabin
boy | knab
woman | virin
man | vir
neighbour | najbar
friend | amik
brother | frat
sister | fratin
dog | hund
cat | kat
horse | ĉeval
cow | bovin
wolf | lup
fox | vulp
mouse | mus
bird | bird
bear | urs
lion | leon
house | dom
book | libr
table | tabl
chair | seĝ
door | pord
window | fenestr
boat | boat
letter | leter
lamp | lamp
clock | horloĝ
key | ŝlosil
box | skatol
cup | tas
knife | tranĉil
hat | ĉapel
shoe | ŝu
ring | ring
basket | korb
bottle | botel
bed | lit
flower | flor
tree | arb
stone | ŝton
apple | pom
cheese | fromaĝ
egg | ov
cake | kuk
pear | pir
soup | sup
garden | ĝarden
kitchen | kuirej
market | bazar
school | lernej
forest | arbar
village | vilaĝ
city | urb
church | preĝej
street | strat
red | ruĝ
white | blank
black | nigr
yellow | flav
green | verd
blue | blu
big | grand
small | malgrand
old | malnov
new | nov
clean | pur
happy | feliĉ
sad | malĝoj
tired | lac
strong | fort
rich | riĉ
poor | malriĉ
slow | malrapid
brave | kuraĝ
round | rond
long | long
see | vid
find | trov
want | vol
paint | pentr
draw | desegn
carry | port
buy | aĉet
sell | vend
lose | perd
hide | kaŝ
wash | lav
need | bezon
move | mov
use | uz
count | kalkul
forget | forges
eat | manĝ
cook | kuir
taste | gustum
cut | tranĉ
sleep | dorm
run | kur
sing | kant
dance | danc
work | labor
walk | promen
laugh | rid
cry | plor
play | lud
swim | naĝ
wait | atend
rest | ripoz
fall | fal
dream | sonĝ
today | hodiaŭ
every day | ĉiutage
in the morning | matene
at night | nokte
again | denove
on Sunday | dimanĉe
""")
)
