"""Write docs/data/tickets.csv: made-up support tickets in four queues, of which two are rare.

    python docs/tools/make_tickets.py

The queues have 70, 20, 7 and 3 percent of the rows. The same seed gives the same file.
"""

import csv
import random
from pathlib import Path

FILE = Path(__file__).parents[1] / "data" / "tickets.csv"
SHARES = {"billing": 210, "technical": 60, "delivery": 21, "legal": 9}
THINGS = ["the basic plan", "my account", "the second order", "the yearly plan", "order 4417"]
TIMES = ["since Monday", "for two weeks", "again today", "after the last update", "this morning"]
SENTENCES = {
    "billing": [
        "I was charged twice for {thing} {time}.",
        "The invoice for {thing} shows a wrong amount {time}.",
        "Please refund what I paid for {thing}.",
        "My card has been declined {time}, though it is valid.",
        "Which tax rate applies to {thing}?",
    ],
    "technical": [
        "The app crashes {time} when I open {thing}.",
        "I cannot log in to {thing} {time}.",
        "The page of {thing} loads without end {time}.",
        "An error message appears {time} when I save.",
    ],
    "delivery": [
        "The parcel with {thing} has not arrived {time}.",
        "The courier left {thing} at a wrong address.",
        "Tracking of {thing} has shown no change {time}.",
    ],
    "legal": [
        "Please delete all personal data that belongs to {thing}.",
        "I withdraw my consent to the terms of {thing}.",
        "Send me a copy of the contract for {thing}.",
    ],
}
OPENINGS = ["Hello.", "Hi,", "Dear team,", "Good morning.", ""]


def main() -> None:
    """Write the file."""
    rng = random.Random(0)
    rows = []
    for queue, count in SHARES.items():
        for _ in range(count):
            filled = rng.choice(SENTENCES[queue]).format(
                thing=rng.choice(THINGS), time=rng.choice(TIMES)
            )
            subject = " ".join(filled.rstrip(".?").split()[:5])
            rows.append([subject, f"{rng.choice(OPENINGS)} {filled}".strip(), queue])
    rng.shuffle(rows)
    with FILE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "subject", "body", "queue"])
        writer.writerows([number, *row] for number, row in enumerate(rows, 1))


if __name__ == "__main__":
    main()
