"""What comes with fastvar beside its library and is known by a name: import paths, resolved when they are used.

The library knows prompts, readers and rewards; what they are of is said here and on the command line alone.
"""

READERS = {
    "easyocr": "fastvar.rl.rewards.readers:EasyOCRReader",
    "handwriting": "fastvar.handwriting:Reader",
    "rapidocr": "fastvar.rl.rewards.readers:RapidOCRReader",
}
DEFAULT_READER = "handwriting"
REWARDS = {"subject": "fastvar.handwriting.evaluation:SubjectReward"}
PROMPTS = "fastvar.handwriting.evaluation:prompts"
