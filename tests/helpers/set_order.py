"""A rank's order of a set of the given words, and the hash that it follows, as a line of JSON."""

import json
import sys

words = sys.argv[1:]
sys.stdout.write(json.dumps([list(set(words)), hash(words[0])]) + "\n")
