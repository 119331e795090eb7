"""Words to name things with. Names are drawn without repetition, however many are asked for."""

import random


def _words(text: str) -> list[str]:
    return text.split()


ADJECTIVES = _words(
    "amber ancient bitter bold brave brief bright brisk calm careful cheerful civil clever coarse cold copper crisp "
    "curious curly daring dense dim distant dizzy dusty eager early elegant empty faint famous fancy fierce final flat "
    "fluffy foggy fond fragile frank fresh frosty gentle giant glad golden grand gray green grim handy happy harsh "
    "hasty heavy hollow honest humble hungry icy idle jolly keen kind large late lazy lively lonely loud loyal lucky "
    "mellow merry mighty mild modest narrow neat noble noisy odd olive orange pale patient plain polite proud purple "
    "quick quiet rapid rare rough round royal rusty salty scarlet shallow sharp shiny silent silver simple slender "
    "smooth solid sour spicy steady steep stern sticky stout strange sturdy subtle sudden sunny sweet swift tall tame "
    "tender thick tidy tiny tough velvet violet vivid warm weary wicked wide wild wise witty wooden young"
)
NOUNS = _words(
    "acorn anchor apple arrow badger bakery balcony bamboo banner barrel basket beacon beetle bicycle blanket bottle "
    "bridge bucket button cabin camel candle canyon carpet castle cellar cherry chimney circle cloud cobra comet "
    "compass coral cottage cradle cricket crown curtain dagger daisy desert diamond dolphin donkey dragon drawer eagle "
    "elbow engine falcon feather fiddle finger flute forest fountain garden garlic giraffe glacier goblet guitar "
    "hammer harbor hazel helmet heron honey hornet igloo insect island ivory jacket jungle kettle kitten ladder "
    "lantern lemon lizard lobster magnet mango marble meadow melon mirror monkey mosaic needle nickel noodle oasis "
    "ocean onion orchard otter oyster paddle palace panther parrot peach pebble pencil pepper pigeon pillow pirate "
    "planet pocket potato puddle pumpkin puppet puzzle quartz rabbit radish raven ribbon river rocket saddle sailor "
    "salmon sandal scarf shadow shovel sparrow spider spoon statue summit sunset tablet teapot temple thistle thunder "
    "tiger timber tomato trumpet tunnel turtle umbrella valley vessel village violin walnut walrus wagon whistle "
    "willow window winter wizard yogurt zebra"
)
FIRST_NAMES = _words(
    "Ada Agnes Albert Alma Anton Beatrice Bruno Carla Cecil Clara Conrad Dora Edgar Edith Elias Emma Ernest Esther "
    "Felix Flora Frida Georg Greta Hannah Hector Helen Hugo Ida Igor Irene Jonas Judith Julius Karl Laura Leon Lydia "
    "Magnus Martha Miriam Nora Oscar Otto Paula Quentin Rosa Rufus Samuel Selma Simon Sofia Theo Ursula Victor Viola "
    "Walter Wanda Xenia Yvonne"
)
LAST_NAMES = _words(
    "Abbott Aldermann Arkwright Ashdown Barlow Beckett Bergstrom Birch Blackwood Brandt Calloway Carver Castellan "
    "Colby Crane Dalton Delacroix Drummond Ellery Fairfax Falkner Fenwick Fontaine Garrick Gladwin Grantham Hale "
    "Harrow Hartmann Hollis Ingram Jarvis Kaplan Kendrick Lachance Langdon Lindqvist Lockhart Marlow Mercer Montrose "
    "Nakano Norwood Oakley Orlov Pemberton Petrov Quill Radcliffe Ravenna Sandoval Sinclair Sorensen Thackeray Tilden "
    "Upton Vance Varga Wexler Whitlock Yates Zeller"
)
TOWNS = _words(
    "Aldermoor Brackwater Calverton Dunmere Eastholm Fallowfield Glenhaven Harrowgate Inverloch Jorvale Kestrelton "
    "Larkhill Millbrook Northwick Oldbury Pennrock Quarrydale Redcliff Stonebridge Thornbury Underhill Valemont "
    "Westmarch Yarrowby Zennor Ashcombe Bellwater Coldspring Driftwood Elmsworth"
)
TRADES = _words(
    "clockmaker cartographer glassblower bookbinder stonemason weaver botanist lighthouse-keeper beekeeper shipwright "
    "printer locksmith violinist surveyor apothecary blacksmith translator astronomer gardener potter"
)


def compound_names(rng: random.Random, count: int) -> list[str]:
    """Different names such as "brave-otter"; of three words where there are not enough of two."""
    pairs = len(ADJECTIVES) * len(NOUNS)
    names = []
    for number in rng.sample(range(pairs if count <= pairs else pairs * len(ADJECTIVES)), count):
        number, noun = divmod(number, len(NOUNS))
        number, adjective = divmod(number, len(ADJECTIVES))
        before = f"{ADJECTIVES[number]}-" if count > pairs else ""
        names.append(f"{before}{ADJECTIVES[adjective]}-{NOUNS[noun]}")
    return names


def person_names(rng: random.Random, count: int) -> list[str]:
    """Different names such as "Ada K. Barlow"."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    total = len(FIRST_NAMES) * len(letters) * len(LAST_NAMES)
    names = []
    for number in rng.sample(range(total), min(count, total)):
        number, last = divmod(number, len(LAST_NAMES))
        first, letter = divmod(number, len(letters))
        names.append(f"{FIRST_NAMES[first]} {letters[letter]}. {LAST_NAMES[last]}")
    return names


def distinguishable_words() -> list[str]:
    """The words that are no part of another one, so that a search for them in an answer finds nothing else."""
    words = [*ADJECTIVES, *NOUNS]
    return [word for word in words if not any(word in other for other in words if other != word)]
