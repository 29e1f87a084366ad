"""Spelling and counting letters; its word list also gives the vocabulary common English words."""

import random
from typing import Any

WORDS = """
about above across action actor address advice afternoon again age agree air album alone along
already always among anger angle animal answer arm army arrow artist aunt autumn away baby back
balance ball band bank bath battle beard beautiful become bed begin behind believe below bench
beside better between bird birthday black blanket blood board body bone born bottle bottom bowl
branch brave bread break breakfast breath brick bright bring brother build building burn business
busy butter button call camera camp capital captain careful carry castle catch center chair chance
change cheap check child chocolate choice church circle clean clear climb clock close cloth cloud
coast coffee cold collect common company complete computer cook copper corner correct cotton count
country course cousin cover create cross crowd culture current dance danger dark daughter dear
decide deep desk detail different difficult dinner direct dirty discover distance doctor door doubt
dream dress drive during dust early earth east easy edge effect either electric elephant empty end
energy engine enjoy enough enter equal evening event every example except excited exercise expect
experience explain eye face fact fall false family famous far fast father favorite feel fever
fight figure find finger finish fire first fish flat float floor fly follow foot forest forget
fork form free freedom fresh friend front full funny future garden gate general gentle giant girl
glass goal gold good grandmother grass great ground group grow guess guide habit hair hammer hand
happen hard health hear heart heat heavy height hello hidden high history hole holiday honest hope
hospital hotel house human hundred hungry husband idea image important inside interest invite iron
island join journey jump just keep kind king kitchen knee knife know ladder language large last
late laugh law lead leaf learn leave left lesson letter level life light lion list listen little
live lock long look loud love luck lunch machine magic make many matter meal mean measure meat
medicine meet memory metal middle minute mirror mistake model modern moment money month moon
mother mountain mouth move music name narrow nation nature near neck need needle neighbor never
new newspaper next night noise normal nose nothing notice number ocean offer office often onion
open opposite order other outside oven own page pain paint pair paper parent part pass past path
peace people perfect perhaps person phone picture piece pilot plain plan plant plate play please
pocket point poor popular position possible potato power practice present pretty price private
problem promise proud pull purpose push question quick quiet quite rabbit radio rain reach ready
real reason receive record red remember repeat rest result return rich ride right ring river road
rock room root rough round rule sad safe salt same sand save science sea season secret see sell
sentence serious seven shade shadow shake shape share sharp ship shoe short shoulder show side
sight signal silence silver simple sister size skin sky sleep slow small smell smile smoke snake
snow soap soft soldier some song soon sound south space speak special spell spoon spring square
stairs star start state steam step still stone stop store storm story straight strange street
strong student subject success sudden sugar summer sun support sure surprise sweet swim system
table tail talk tall taste teach tear tell thank thick thin thing think thought thousand thread
throat through throw ticket tiger time tired today together tomorrow tongue tooth top touch toward
travel tree trick trouble true trust truth try turn twelve uncle under understand universe until
useful valley value vegetable village visit voice wait wake walk wall want war warm wash watch
water wave way weak wear weather week weight welcome wheel when while white whole wide wild window
winter wise wish wonder wood word work world worry write wrong yard year yellow yesterday young
""".split()


def spelling_chat(rng: random.Random) -> dict[str, Any]:
    """Spell a word, count its letters, name its first letter, or write it in capitals."""
    word = rng.choice(WORDS)
    letters = "-".join(word)
    kind = rng.randrange(4)
    asks, answer = (
        ((f"Spell {word}.", f"How do you spell {word}?", f"Spell the word {word}."),
         f"{word} is spelled {letters}."),
        ((f"How many letters does {word} have?", f"Count the letters of {word}."),
         f"{letters}: {word} has {len(word)} letters."),
        ((f"What is the first letter of {word}?", f"With which letter does {word} start?"),
         f"The first letter of {word} is {word[0]}."),
        ((f"Write {word} in capital letters.", f"Put {word} in capitals."),
         word.upper() + "."),
    )[kind]  # fmt: skip
    return {
        "messages": [
            {"role": "user", "content": rng.choice(asks)},
            {
                "role": "assistant",
                "reasoning_content": f"The letters of {word} are {letters}.",
                "content": answer,
            },
        ],
        "thinks_when_adaptive": False,
    }
