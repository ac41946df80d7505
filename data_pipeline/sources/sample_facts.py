"""The fact tables of the built-in sample corpus: each table's facts, and the phrasings that ask for them.

A fact has one subject and one canonical answer in every phrasing, so that an exact match is a fair measure. Facts with
two right answers or a dispute about them are left out on purpose (Bolivia's capital, the number of continents, a young
wolf).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class FactTable:
    """Facts of one kind, as subject → answer, and the phrasings, each with one `{}` for the subject."""

    name: str
    source: str
    phrasings: tuple[str, ...]
    answers: dict[str, str]
    held_out: int


def _read(text: str) -> dict[str, str]:
    """Parse a table written as `subject: answer; subject: answer`."""
    pairs = [entry.split(":") for entry in " ".join(text.split()).split(";") if entry.strip()]
    table = {subject.strip(): answer.strip() for subject, answer in pairs}
    if len(table) != len(pairs):
        raise ValueError(f"a subject occurs twice in the table that begins with {text.split(';')[0].strip()!r}")
    return table


def _reverse(table: dict[str, str]) -> dict[str, str]:
    return {answer: subject for subject, answer in table.items()}


CAPITALS = _read("""
    France: Paris; Germany: Berlin; Italy: Rome; Spain: Madrid; Portugal: Lisbon; Austria: Vienna; Belgium: Brussels;
    Denmark: Copenhagen; Sweden: Stockholm; Norway: Oslo; Finland: Helsinki; Iceland: Reykjavík; Ireland: Dublin;
    Poland: Warsaw; Hungary: Budapest; Romania: Bucharest; Bulgaria: Sofia; Greece: Athens; Croatia: Zagreb;
    Slovenia: Ljubljana; Slovakia: Bratislava; Serbia: Belgrade; Albania: Tirana; Estonia: Tallinn; Latvia: Riga;
    Lithuania: Vilnius; Ukraine: Kyiv; Egypt: Cairo; Morocco: Rabat; Tunisia: Tunis; Algeria: Algiers; Kenya: Nairobi;
    Uganda: Kampala; Rwanda: Kigali; Ethiopia: Addis Ababa; Ghana: Accra; Senegal: Dakar; Nigeria: Abuja;
    Angola: Luanda; Zambia: Lusaka; Zimbabwe: Harare; Namibia: Windhoek; Japan: Tokyo; China: Beijing;
    Mongolia: Ulaanbaatar; Thailand: Bangkok; Vietnam: Hanoi; Nepal: Kathmandu; India: New Delhi; Bangladesh: Dhaka;
    Iran: Tehran; Iraq: Baghdad; Jordan: Amman; Lebanon: Beirut; Qatar: Doha; Oman: Muscat; Canada: Ottawa;
    Mexico: Mexico City; Cuba: Havana; Jamaica: Kingston; Costa Rica: San José; Colombia: Bogotá; Peru: Lima;
    Ecuador: Quito; Brazil: Brasília; Paraguay: Asunción; Uruguay: Montevideo; Argentina: Buenos Aires;
    Australia: Canberra; New Zealand: Wellington
""")

# Egypt and the island states are left out, because their continent is debatable.
CONTINENTS = {
    country: continent
    for continent, countries in {
        "Europe": "France Germany Italy Spain Poland Sweden Norway Ireland Greece Hungary Austria Belgium Ukraine",
        "Africa": "Morocco Kenya Uganda Ghana Senegal Nigeria Angola Zambia Ethiopia Rwanda Tunisia Algeria",
        "Asia": "Japan China Mongolia Thailand Vietnam Nepal India Bangladesh Iran Iraq Jordan Lebanon",
        "South America": "Colombia Peru Ecuador Brazil Paraguay Uruguay Argentina",
        "North America": "Canada Mexico",
    }.items()
    for country in countries.split()
}

SYMBOLS = _read("""
    hydrogen: H; helium: He; lithium: Li; beryllium: Be; boron: B; carbon: C; nitrogen: N; oxygen: O; fluorine: F;
    neon: Ne; sodium: Na; magnesium: Mg; aluminum: Al; silicon: Si; phosphorus: P; sulfur: S; chlorine: Cl; argon: Ar;
    potassium: K; calcium: Ca; iron: Fe; copper: Cu; zinc: Zn; silver: Ag; gold: Au; tin: Sn; lead: Pb; mercury: Hg;
    nickel: Ni; iodine: I
""")
ATOMIC_NUMBERS = {element: str(number) for number, element in enumerate(list(SYMBOLS)[:20], start=1)}

# Only pairs that work in both directions. "short" is left out: its opposite could be "tall" or "long".
_OPPOSITES = _read("""
    hot: cold; up: down; open: closed; wet: dry; fast: slow; early: late; full: empty; strong: weak; rich: poor;
    loud: quiet; happy: sad; inside: outside; true: false; day: night; love: hate; win: lose; buy: sell; push: pull;
    clean: dirty; north: south; east: west; above: below; always: never; before: after; first: last
""")
OPPOSITES = _OPPOSITES | _reverse(_OPPOSITES)

PLURALS = _read("""
    child: children; mouse: mice; man: men; woman: women; foot: feet; tooth: teeth; goose: geese; ox: oxen;
    sheep: sheep; leaf: leaves; knife: knives; wolf: wolves; wife: wives; life: lives; shelf: shelves; loaf: loaves;
    box: boxes; bus: buses; dish: dishes; church: churches; city: cities; baby: babies; lady: ladies; story: stories;
    potato: potatoes; tomato: tomatoes; cat: cats; tree: trees; book: books; café: cafés
""")

PAST_TENSES = _read("""
    go: went; see: saw; eat: ate; take: took; give: gave; come: came; run: ran; write: wrote; drink: drank; sing: sang;
    swim: swam; begin: began; break: broke; speak: spoke; drive: drove; fly: flew; know: knew; grow: grew; draw: drew;
    buy: bought; bring: brought; think: thought; teach: taught; catch: caught; find: found; hold: held; keep: kept;
    sleep: slept; feel: felt; leave: left; make: made; have: had; say: said; sell: sold; tell: told; stand: stood;
    walk: walked; jump: jumped; play: played; help: helped
""")

SPELLED_WORDS = """apple bread chair dream earth flower garden house island jacket king lemon mountain night orange
    paper queen river stone table uncle violin water yellow zebra bottle candle doctor engine finger""".split()

YOUNG_ANIMALS = _read("""
    dog: puppy; cat: kitten; cow: calf; horse: foal; sheep: lamb; pig: piglet; goat: kid; duck: duckling;
    goose: gosling; swan: cygnet; deer: fawn; lion: cub; bear: cub; kangaroo: joey; frog: tadpole;
    butterfly: caterpillar; owl: owlet; elephant: calf; whale: calf; seal: pup; tiger: cub; zebra: foal
""")

ANIMAL_GROUPS = {
    animal: group
    for group, animals in {
        "mammals": "dog cat horse whale bat elephant tiger dolphin mouse",
        "birds": "eagle owl penguin duck swan ostrich parrot",
        "fish": "salmon shark tuna trout",
        "reptiles": "snake lizard turtle crocodile",
        "amphibians": "frog toad newt",
        "insects": "ant bee butterfly beetle mosquito",
    }.items()
    for animal in animals.split()
}

ANIMAL_LEGS = _read("""
    spider: 8; ant: 6; bee: 6; beetle: 6; butterfly: 6; dog: 4; horse: 4; cow: 4; frog: 4; duck: 2; owl: 2
""")

WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
MONTH_LENGTHS = dict(zip(MONTHS, "31 28 31 30 31 30 31 31 30 31 30 31".split(), strict=True))

PLANETS = "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()

# The colors of mixed paint, not of mixed light.
COLORS = _read("""
    red & yellow: orange; blue & yellow: green; red & blue: purple; red & white: pink; black & white: gray;
    yellow & red: orange; yellow & blue: green; blue & red: purple; white & red: pink; white & black: gray
""")

NUMBER_WORDS = dict(zip(map(str, range(1, 21)), """one two three four five six seven eight nine ten eleven twelve
    thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty""".split(), strict=True))
ROMAN_NUMERALS = dict(zip(map(str, range(1, 21)), """I II III IV V VI VII VIII IX X XI XII XIII XIV XV XVI XVII XVIII
    XIX XX""".split(), strict=True))

ORGANS = _read("""
    pumps blood: the heart; digests food with acid: the stomach; lets us see: the eye; lets us hear: the ear;
    lets us smell: the nose; does the thinking: the brain; makes bile: the liver;
    filters blood into urine: the kidney; stores urine: the bladder; takes in oxygen from air: the lung;
    covers the whole body: the skin; tastes food: the tongue
""")

DEFINITIONS = _read("""
    frozen water: ice; water as a gas: steam; melted rock from a volcano: lava; a shape with three sides: a triangle;
    a shape with five sides: a pentagon; a shape with six sides: a hexagon; a shape with eight sides: an octagon;
    a scientist who studies stars: an astronomer; a person who bakes bread: a baker; a person who flies a plane: a pilot;
    a person who writes books: an author; a doctor for teeth: a dentist; a doctor for animals: a veterinarian;
    a person who teaches: a teacher; a person who paints pictures: a painter; a place where books are lent: a library;
    a place where planes land: an airport; a place where trains stop: a station; a place where films are shown: a cinema;
    a period of ten years: a decade; a period of 100 years: a century; a period of 1000 years: a millennium;
    an animal that eats only plants: a herbivore; an animal that eats only meat: a carnivore;
    an animal that eats plants and meat: an omnivore; dried grapes: raisins; the brother of a parent: an uncle;
    the sister of a parent: an aunt; the son of a king: a prince; the daughter of a king: a princess;
    the mother of a parent: a grandmother; the father of a parent: a grandfather; half of a circle: a semicircle;
    an angle of 90 degrees: a right angle; an angle smaller than 90 degrees: an acute angle;
    the distance around a circle: the circumference; the result of an addition: the sum;
    the result of a subtraction: the difference; the result of a multiplication: the product;
    the result of a division: the quotient; the top number of a fraction: the numerator;
    the bottom number of a fraction: the denominator; a device that measures temperature: a thermometer;
    a device that tells the time: a clock; a device that makes far things look near: a telescope;
    a device that makes tiny things look big: a microscope; land with water all around it: an island;
    a very dry place with little rain: a desert; a mountain that can erupt: a volcano
""")

GENERAL_KNOWLEDGE = _read("""
    the boiling point of water at sea level in Celsius: 100 degrees; the freezing point of water in Celsius: 0 degrees;
    the largest planet in the solar system: Jupiter; the planet closest to the sun: Mercury;
    the red planet: Mars; the planet we live on: Earth; the star closest to the Earth: the Sun;
    the largest ocean on Earth: the Pacific Ocean; the highest mountain on Earth: Mount Everest;
    the tallest animal: the giraffe; the largest animal: the blue whale; the fastest land animal: the cheetah;
    the author of Hamlet: William Shakespeare; the painter of the Mona Lisa: Leonardo da Vinci;
    the first person on the Moon: Neil Armstrong; the author of Don Quixote: Miguel de Cervantes;
    the chemical formula of water: H2O; the chemical formula of carbon dioxide: CO2;
    the chemical formula of table salt: NaCl; the chemical formula of methane: CH4;
    the hardest mineral on the Mohs scale: diamond;
    the gas that plants take in for photosynthesis: carbon dioxide; the gas in air that we need to breathe: oxygen;
    the most common gas in air: nitrogen; the lightest element: hydrogen; the metal that is liquid at room temperature: mercury;
    the green pigment of leaves: chlorophyll; the force that pulls things to the ground: gravity;
    the center of an atom: the nucleus; the particle with a negative charge: the electron;
    the particle with a positive charge in the nucleus: the proton; the particle with no charge in the nucleus: the neutron;
    the SI unit of electric current: the ampere; the SI unit of force: the newton; the SI unit of energy: the joule;
    the SI unit of electric resistance: the ohm; the SI unit of power: the watt; the SI unit of frequency: the hertz;
    the number of letters in the English alphabet: 26; the number of days in a week: 7; the number of months in a year: 12;
    the number of sides of a square: 4; the number of degrees in a circle: 360;
    the sum of the angles of a triangle in degrees: 180; the square root of 81: 9; the square root of 144: 12;
    the smallest prime number: 2; the first letter of the alphabet: A; the last letter of the alphabet: Z;
    the official language of Brazil: Portuguese; the official language of Austria: German; the currency of Japan: the yen;
    the currency of India: the rupee; the currency of Mexico: the peso
""")

_NAMING = ("What do we call {}?", "What is the word for {}?", "What's the name for {}?", "Which word means {}?",
           "How do you say {} in one term?", "Give the term for {}.")
_ANIMAL_YOUNG = ("What is a young {} called?", "What do you call a baby {}?", "Name the young of the {}.",
                 "What's the word for a young {}?", "A baby {} is known as what?")

FACT_TABLES = (
    FactTable("capitals", "stackexchange", (
        "What is the capital of {}?", "Which city is the capital of {}?", "Name the capital city of {}.",
        "The country {} has which capital?", "Can you tell me the capital of {}?", "What's {}'s capital?",
    ), CAPITALS, 16),
    FactTable("continents", "stackexchange", (
        "On which continent is {}?", "What continent is {} in?", "On what continent does {} lie?",
        "Name the continent where {} is found.", "The country {} is part of which continent?",
    ), CONTINENTS, 6),
    FactTable("symbols", "socratic", (
        "What is the chemical symbol for {}?", "Which symbol stands for {}?", "What's the symbol of the element {}?",
        "How is {} written in the periodic table?", "Give the chemical symbol of {}.",
    ), SYMBOLS, 6),
    FactTable("elements", "socratic", (
        "Which element has the symbol {}?", "What does the symbol {} stand for in chemistry?",
        "Name the element written as {}.", "The chemical symbol {} means which element?", "Of which element is {} the symbol?",
    ), _reverse(SYMBOLS), 5),
    FactTable("atomic numbers", "socratic", (
        "What is the atomic number of {}?", "How many protons does {} have?", "Give the atomic number of {}.",
        "How many protons are in an atom of {}?", "The atomic number of {} is what?",
    ), ATOMIC_NUMBERS, 4),
    FactTable("opposites", "stackexchange", (
        "What is the opposite of {}?", 'Which word is the opposite of "{}"?', "Give the opposite of {}.",
        "What's the antonym of {}?", 'Which word means the reverse of "{}"?',
    ), OPPOSITES, 9),
    FactTable("plurals", "stackexchange", (
        "What is the plural of {}?", 'How do you write "{}" in the plural?', "Give the plural form of {}.",
        "One {}, two what?", 'What\'s the plural of the noun "{}"?',
    ), PLURALS, 6),
    FactTable("past tenses", "stackexchange", (
        "What is the past tense of {}?", 'Put the verb "{}" in the past tense.', "Give the simple past of {}.",
        "Today I {}. Yesterday I what?", 'What\'s the past form of the verb "{}"?',
    ), PAST_TENSES, 7),
    FactTable("first letters", "stackexchange", (
        "What is the first letter of {}?", 'Which letter does "{}" begin with?', "The word {} starts with which letter?",
        'Name the first letter in the word "{}".', "What letter comes first in {}?",
    ), {word: word[0] for word in SPELLED_WORDS}, 4),
    FactTable("last letters", "stackexchange", (
        "What is the last letter of {}?", 'Which letter does "{}" end with?', "The word {} ends in which letter?",
        'Name the last letter in the word "{}".', "What letter comes last in {}?",
    ), {word: word[-1] for word in SPELLED_WORDS}, 3),
    FactTable("young animals", "socratic", _ANIMAL_YOUNG, YOUNG_ANIMALS, 4),
    FactTable("animal groups", "socratic", (
        "To which group of animals does the {} belong?", "The {} belongs to which animals?",
        "What kind of animals are the {} and its relatives?",
        "Which group of animals is the {} in?", "Name the animal group of the {}.",
    ), ANIMAL_GROUPS, 4),
    FactTable("animal legs", "socratic", (
        "How many legs does a grown {} have?", "A grown {} has how many legs?", "Count the legs of a grown {}.",
        "What is the number of legs of a grown {}?", "How many legs do you see on a grown {}?",
    ), ANIMAL_LEGS, 2),
    FactTable("next weekdays", "stackexchange", (
        "What day comes after {}?", "Which day follows {}?", "If today is {}, what day is tomorrow?",
        "Name the day right after {}.", "What's the next day after {}?",
    ), dict(zip(WEEKDAYS, WEEKDAYS[1:] + WEEKDAYS[:1], strict=True)), 2),
    FactTable("previous weekdays", "stackexchange", (
        "What day comes before {}?", "Which day precedes {}?", "If today is {}, what day was yesterday?",
        "Name the day right before {}.", "What's the last day before {}?",
    ), dict(zip(WEEKDAYS, WEEKDAYS[-1:] + WEEKDAYS[:-1], strict=True)), 2),
    FactTable("next months", "stackexchange", (
        "Which month comes after {}?", "What month follows {}?", "If this month is {}, what is next month?",
        "Name the month right after {}.", "What's the next month after {}?",
    ), dict(zip(MONTHS, MONTHS[1:] + MONTHS[:1], strict=True)), 3),
    FactTable("previous months", "stackexchange", (
        "Which month comes before {}?", "What month precedes {}?", "If this month is {}, what was last month?",
        "Name the month right before {}.", "What's the last month before {}?",
    ), dict(zip(MONTHS, MONTHS[-1:] + MONTHS[:-1], strict=True)), 3),
    FactTable("month lengths", "stackexchange", (
        "How many days are in {} in a common year?", "In a common year, how long is {} in days?",
        "In a common year, {} has how many days?", "What is the number of days of {} in a common year?",
    ), MONTH_LENGTHS, 2),
    FactTable("month numbers", "stackexchange", (
        "Which is the {} month of the year?", "What is the name of the {} month?", "Name the {} month of the year.",
        "The {} month of the year is called what?", "What's the {} month in the calendar?",
    ), dict(zip(ORDINALS, MONTHS, strict=True)), 3),
    FactTable("planets", "socratic", (
        "Which is the {} planet from the Sun?", "What is the name of the {} planet from the Sun?",
        "Name the {} planet counted from the Sun.", "Counted from the Sun, which planet is the {}?",
        "What's the {} planet of the solar system?",
    ), dict(zip(ORDINALS, PLANETS, strict=False)), 2),
    FactTable("colors", "socratic", (
        "What color do {} paint make?", "Mixing {} paint gives which color?", "Which color do you get from {} paint?",
        "If you mix {} paint, what color is it?", "What's the color of {} paint mixed together?",
    ), COLORS, 2),
    FactTable("number words", "mathstackexchange", (
        "How is the number {} written in words?", "Write {} as a word.", "Spell the number {}.",
        "Which word stands for the number {}?", "What's the English word for {}?",
    ), NUMBER_WORDS, 4),
    FactTable("Roman numerals", "mathstackexchange", (
        "How is {} written in Roman numerals?", "Write {} as a Roman numeral.", "What is the Roman numeral for {}?",
        "Which Roman numeral means {}?", "Give {} in Roman numerals.",
    ), ROMAN_NUMERALS, 4),
    FactTable("organs", "socratic", (
        "Which organ {}?", "Name the organ that {}.", "What is the organ that {} called?",
        "Which part of the body {}?", "Can you name the organ that {}?",
    ), ORGANS, 3),
    FactTable("definitions", "socratic", _NAMING, DEFINITIONS, 10),
    FactTable("general knowledge", "socratic", (
        "What is {}?", "Tell me {}.", "Can you name {}?", "State {}.", "I'd like to know {}. What is it?",
        "Do you know {}?",
    ), GENERAL_KNOWLEDGE, 11),
)
