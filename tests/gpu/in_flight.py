"""in_flight.py FILE.ptx: the rules of wgmma, read off the code that the compiler made. A product runs beside the threads
that issued it, so from there to the wait for its group nothing reads or writes its sums, nothing writes its A
registers; and each group begins with a fence. (Blocks are read in the order of the text, which is that of the code.)
"""
import re
import sys

REGISTER = re.compile(r"%[a-z]+\d+")
PRODUCT = re.compile(r"wgmma\.mma_async\S+\s*\{([^}]*)\},\s*\{([^}]*)\}")
WAIT = re.compile(r"wgmma\.wait_group\S*\s+(\d+)")
RESULT = re.compile(r"\s*(?:@\S+\s+)?[a-z][\w.]*\s+(\{[^}]*\}|%\w+)")


def breaches(lines):
    groups, products, fenced = [], [], False
    for number, line in enumerate(lines, 1):
        if ".entry" in line:
            groups, products, fenced = [], [], False
        elif "wgmma.fence" in line:
            fenced = True
        elif "wgmma.commit_group" in line:
            groups.append(products)
            products, fenced = [], False
        elif wait := WAIT.search(line):
            groups = groups[max(0, len(groups) - int(wait.group(1))):]
        elif product := PRODUCT.search(line):
            if not fenced:
                yield number, line, "a product without a fence in its group"
            products.append([set(REGISTER.findall(part)) for part in product.groups()])
        elif not line.strip().startswith(".reg"):
            used = set(REGISTER.findall(line))
            result = RESULT.match(line)
            written = set(REGISTER.findall(result.group(1))) if result else set()
            for sums, a in sum(groups, products):
                if used & sums or written & a:
                    yield number, line, "a register of a product in flight"


def main(path):
    with open(path, encoding="ascii") as f:
        lines = f.readlines()
    n = sum(1 for line in lines if PRODUCT.search(line))
    found = list(breaches(lines))
    for number, line, why in found[:10]:
        print(f"{number}: {why}: {line.strip()}")
    print(f"{n} wgmma, {len(found)} breaches")
    return 1 if found or n == 0 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
