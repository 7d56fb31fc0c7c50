#!/usr/bin/env python3
"""Writes instruction rows of hone's own making, with the lengths of Alpaca's (about 110 tokens a row): rows.py N FILE.jsonl

The same bytes every time. Words come from a list with the frequencies of a real text (Zipf), beside numbers and made names,
so that caches of words meet what they meet in real data.
"""

import json
import random
import sys

COMMON = """the of and to a in is that it was for on are as with they be at one have this from by hot word but what some you had we can out other were all your when up use how said each she which do their time if will way about many then them would write like so these her long make thing see him two has look more day could go come did number sound no most people my over know water than call first who may down side been now find any new work part take get place made live where after back little only round man year came show every good me give our under name very through just form sentence great think say help low line differ turn cause much mean before move right boy old too same tell does set three want air well also play small end put home read hand port large spell add even land here must big high such follow act why ask men change went light kind off need house picture try us again animal point mother world near build self earth father head stand own page should country found answer school grow study still learn plant cover food sun four between state keep eye never last let thought city tree cross farm hard start might story saw far sea draw left late run while press close night real life few north open seem together next white children begin got walk example ease paper group always music those both mark often letter until mile river car feet care second book carry took science eat room friend began idea fish mountain stop once base hear horse cut sure watch color face wood main enough plain girl usual young ready above ever red list though feel talk bird soon body dog family direct pose leave song measure door product black short numeral class wind question happen complete ship area half rock order fire south problem piece told knew pass since top whole king space heard best hour better true during hundred five remember step early hold west ground interest reach fast verb sing listen six table travel less morning ten simple several vowel toward war lay against pattern slow center love person money serve appear road map rain rule govern pull cold notice voice unit power town fine certain fly fall lead cry dark machine note wait plan figure star box noun field rest correct able pound done beauty drive stood contain front teach week final gave green oh quick develop ocean warm free minute strong special mind behind clear tail produce fact street inch multiply nothing course stay wheel full force blue object decide surface deep moon island foot system busy test record boat common gold possible plane stead dry wonder laugh thousand ago ran check game shape equate miss brought heat snow tire bring yes distant fill east paint language among""".split()
RARE_STEMS = "calibrat negotiat photosynth hydrolog cartograph algorithm bureaucra infrastruct philosoph meteorolog entrepreneur archaeolog thermodynam psycholog constitut manufactur".split()
ENDINGS = "e es ed ing ion ions ic ical ically ist ists y ies al ally able".split()
VERBS = "Explain Describe List Compare Summarize Rewrite Translate Classify Suggest Name Outline Correct Generate Identify Write".split()
SYLLABLES = "ba be bri ca cor da dun el fa gri ha il jo ka lo ma nor o pel qui ra sol ta ul ven wy xa yo zan".split()


class Rows:
    def __init__(self, seed):
        self.draw = random.Random(seed)
        self.weights = [1 / (i + 2) for i in range(len(COMMON))]

    def word(self):
        kind = self.draw.random()
        if kind < 0.86:
            return self.draw.choices(COMMON, self.weights)[0]
        if kind < 0.94:
            return self.draw.choice(COMMON) + self.draw.choice(["s", "ed", "ing", "er", "ly", "'s", "-like"])
        if kind < 0.97:
            return self.draw.choice(RARE_STEMS) + self.draw.choice(ENDINGS)
        if kind < 0.985:
            return "".join(self.draw.choice(SYLLABLES) for _ in range(self.draw.randrange(2, 5))).capitalize()
        return str(self.draw.randrange(10 ** self.draw.randrange(1, 7)))

    def sentence(self, n_words):
        words = [self.word() for _ in range(max(2, n_words))]
        words[0] = words[0][:1].upper() + words[0][1:]
        if n_words > 8 and self.draw.random() < 0.6:
            words[n_words // 2] += ","
        return " ".join(words) + self.draw.choice([".", ".", ".", ".", "?", "!"])

    def text(self, n_words):
        out = []
        while n_words > 0:
            n = min(n_words, self.draw.randrange(5, 22))
            out.append(self.sentence(n))
            n_words -= n
        lines = self.draw.random()
        if lines < 0.15:
            return "\n".join(f"{i + 1}. {s}" for i, s in enumerate(out))
        return ("\n\n" if lines < 0.25 else " ").join(out)

    def row(self):
        ask = self.draw.choice(VERBS) + " " + self.sentence(self.draw.randrange(5, 16)).lower()
        if self.draw.random() < 0.4:
            ask += "\n" + self.text(self.draw.randrange(3, 40))
        answer = self.text(min(400, int(self.draw.lognormvariate(3.65, 0.9)) + 1))
        return dict(messages=[dict(role="user", content=ask), dict(role="assistant", content=answer)])


def main():
    n, path = int(sys.argv[1]), sys.argv[2]
    rows = Rows(20260101)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(n):
            file.write(json.dumps(rows.row(), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
