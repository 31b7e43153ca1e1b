"""Of photographs of one common thing, how many captions name it, by its name or a near word.

    git clone https://github.com/EliSchwartz/imagenet-sample-images
    python photographs.py --program ../target/release/blip2 --model mini imagenet-sample-images

Needs nothing but Python. The folder has one photograph of each of ImageNet's thousand classes, `WNID_name.JPEG`; those that show an
animal, a vehicle, food, a flower or a tool are captioned (469), and a caption names the thing if it has one of the words of its kind
below. Says how many there are of each kind, of all, and in the mean of the kinds, for a quarter of ImageNet's animals are dogs.
"""

import argparse
import json
import os
import re
import subprocess
import sys

# kind: classes, as WordNet ids: words that name it; a later line overrules an earlier one
KINDS = """
fish: n01440764-n01443537 n02536864-n02655020: fish shark
shark: n01484850-n01494475: shark fish
rooster: n01514668-n01514859: chicken hen rooster cock bird chick
bird: n01518878-n01616318 n01795545-n01860187 n02002556-n02058221: bird birds
bird: n01518878: ostrich bird
bird: n01608432-n01616318: eagle vulture kite hawk falcon bird
bird: n01806143: peacock bird
bird: n01806567-n01807496: quail partridge chicken bird
bird: n01817953-n01820546: parrot macaw cockatoo bird
bird: n01829413-n01833805: hornbill hummingbird bird birds
bird: n01843383: toucan bird
bird: n01847000-n01860187: duck ducks goose geese swan bird birds
bird: n02002556-n02013706: stork spoonbill flamingo heron egret crane bird birds
bird: n02051845-n02058221: pelican penguin albatross gull bird
owl: n01622779: owl bird
frog: n01641577-n01644900: frog toad
turtle: n01664065-n01669191: turtle tortoise
lizard: n01675722-n01695060: lizard gecko iguana chameleon dragon
crocodile: n01697457-n01698640: crocodile alligator
snake: n01728572-n01756291: snake cobra python
spider: n01773157-n01775062: spider
marsupial: n01877812-n01883070: kangaroo koala wallaby wombat bear
jellyfish: n01910747: jellyfish
snail: n01944390-n01945685: snail slug
crab: n01978287-n01981276 n01986214: crab
lobster: n01983481-n01985128: lobster crayfish
whale: n02066245-n02071294: whale orca dolphin
seal: n02074367: seal dugong
seal: n02077923: seal lion
dog: n02085620-n02113978: dog dogs puppy puppies poodle
wolf: n02114367-n02116738: wolf dog coyote dingo
fox: n02119022-n02120505: fox
cat: n02123045-n02124075: cat cats kitten
big cat: n02125311-n02130308: lion tiger leopard jaguar cheetah cat lynx cougar panther
bear: n02132136-n02134418: bear
beetle: n02165105-n02177972: beetle bug ladybug insect
insect: n02190166-n02264363: insect bug
insect: n02190166: fly insect bug
insect: n02206856: bee insect bug
insect: n02219486: ant insect bug
insect: n02226429-n02229544: grasshopper cricket insect bug
insect: n02233338: cockroach insect bug
insect: n02236044: mantis insect bug
dragonfly: n02268443-n02268853: dragonfly insect
butterfly: n02276258-n02281787: butterfly
starfish: n02317335: starfish
rabbit: n02325366-n02328150: rabbit hare bunny
rodent: n02342885-n02364673: hamster mouse rat squirrel porcupine marmot beaver guinea
horse: n02389026: horse
zebra: n02391049: zebra
pig: n02395406-n02397096: pig boar hog
hippo: n02398521: hippopotamus hippo
cow: n02403003-n02410509: cow ox buffalo bison bull cattle
sheep: n02412080-n02417914: sheep ram goat ibex
antelope: n02422106-n02423022: antelope deer gazelle impala
camel: n02437312-n02437616: camel llama
weasel: n02441942-n02447366: weasel mink otter skunk ferret polecat badger
monkey: n02480495-n02494079: monkey ape gorilla chimpanzee orangutan gibbon baboon
elephant: n02504013-n02504458: elephant
panda: n02509815-n02510455: panda bear
car: n02814533 n02930766 n03100240 n03594945 n03670208 n03770679 n03777568 n03977966 n04037443 n04285008: car cars taxi cab jeep van truck limousine vehicle auto automobile
truck: n02701002 n03345487 n03417042 n03796401 n03930630 n04461696 n04467665: truck van vehicle ambulance
bus: n03769881 n04146614 n04487081: bus vehicle
train: n02917067 n03272562 n03393912 n03895866 n04310018 n04335435: train locomotive tram railway engine streetcar
ship: n02687172 n02951358 n02981792 n03095699 n03344393 n03447447 n03662601 n03673027 n03947888 n04147183 n04273569 n04347754 n04483307 n04612504: ship boat ships boats canoe submarine yacht sailboat
airplane: n02690373-n02692877 n04552348 n04592741: airplane plane aircraft airplanes jet airship
bicycle: n02835271 n03792782 n04482393 n04509417: bicycle bike cycle tricycle unicycle
motorcycle: n03785016 n03791053: motorcycle motorbike moped scooter bike
tractor: n03496892 n04465501: tractor
bread: n07684084-n07695742: bread bagel pretzel loaf
fast food: n07697313: hamburger cheeseburger burger sandwich
fast food: n07697537: hotdog hot sandwich
ice cream: n07614500-n07615774: ice cream icecream dessert
vegetable: n07714571: cabbage lettuce vegetable vegetables
vegetable: n07714990: broccoli vegetable vegetables
vegetable: n07715103: cauliflower vegetable vegetables
vegetable: n07716358: zucchini cucumber vegetable vegetables
vegetable: n07716906-n07717556: squash pumpkin vegetable vegetables
vegetable: n07718472: cucumber vegetable vegetables
vegetable: n07718747-n07730033: artichoke vegetable vegetables
vegetable: n07720875: pepper peppers vegetable vegetables
mushroom: n07734744 n12998815 n13054560: mushroom mushrooms
fruit: n07742313: apple apples fruit
fruit: n07745940: strawberry strawberries berry berries fruit
fruit: n07747607: orange oranges fruit
fruit: n07749582: lemon lemons fruit
fruit: n07753113: fig figs fruit
fruit: n07753275: pineapple pineapples fruit
fruit: n07753592: banana bananas fruit
fruit: n07754684-n07760859: fruits fruit
fruit: n07768694: pomegranate pomegranates fruit
pizza: n07873807: pizza
pasta: n07831146: pasta spaghetti noodles food
coffee: n03063599 n07920052-n07930864: coffee cup espresso mug
wine: n07892512: wine
burrito: n07880968: burrito food sandwich
corn: n12144580: corn maize
flower: n11939491-n12057211: flower flowers daisy orchid
tool: n02966687: hammer saw tool tools
tool: n03000684: chainsaw saw tool tools
tool: n03041632: cleaver knife tool tools
tool: n03109150: corkscrew tool tools
tool: n03481172: hammer tool tools
tool: n03498962: hatchet axe tool tools
tool: n03658185: knife tool tools
tool: n03804744: nail nails tool tools
tool: n03995372: drill tool tools
tool: n04153751-n04154565: screw screws screwdriver tool tools
tool: n04208210: shovel spade tool tools
tool: n04270147: spatula tool tools
tool: n04376876: syringe tool tools
"""


def kinds(classes):
    """Class → its kind and the kind's words, of all of `classes` (sorted) that have one."""
    found = {}
    for line in KINDS.strip().splitlines():
        kind, ranges, words = line.split(": ")
        for first, _, last in (each.partition("-") for each in ranges.split()):
            for wnid in classes:
                if first <= wnid <= (last or first):
                    found[wnid] = (kind, set(words.split()))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True, help="blip2")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--stage", choices=["1", "2", "both"], help="who writes [default: as the model says]")
    parser.add_argument("--all", action="store_true", help="show every caption")
    parser.add_argument("folder")
    args = parser.parse_args()
    files = {name.split("_")[0]: os.path.join(args.folder, name) for name in sorted(os.listdir(args.folder)) if re.match(r"n\d{8}_.*\.JPEG$", name)}
    known = kinds(sorted(files))
    pictures = {files[wnid]: each for wnid, each in known.items()}
    if not pictures:
        sys.exit(f"{args.folder}: no picture named like n02123045_tabby.JPEG")
    stage = ["--stage", args.stage] if args.stage else []
    command = [args.program, "caption", "--model", args.model, "--format", "jsonl", *stage, *pictures]
    # Ends with 1 if a picture could not be read, and says which: it counts as not there.
    done = subprocess.run(command, stdout=subprocess.PIPE)
    if done.returncode not in (0, 1):
        sys.exit(done.returncode)
    named = {}
    for row in map(json.loads, done.stdout.splitlines()):
        if "captions" not in row:
            continue
        kind, words = pictures[row["image"]]
        text = row["captions"][0]["text"]
        hit = not words.isdisjoint(re.findall("[a-z]+", text.lower()))
        named.setdefault(kind, []).append(hit)
        if args.all:
            print(f"{'+' if hit else '-'} {kind}: {text}")
    print(", ".join(f"{kind} {sum(hits)} of {len(hits)}" for kind, hits in named.items()))
    if not named:
        sys.exit("no picture was captioned")
    hits = [hit for each in named.values() for hit in each]
    mean = sum(sum(each) / len(each) for each in named.values()) / len(named)
    print(f"{sum(hits)} of {len(hits)} named, {sum(hits) / len(hits):.1%}; mean of {len(named)} kinds {mean:.1%}")


if __name__ == "__main__":
    main()
