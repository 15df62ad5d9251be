"""First words of texts of many kinds, for a model that writes its own calibration text.

What a model samples from nothing soon reads like no text that people have; behind a few words it is a text of
their kind. Ours, in English: other languages follow where the model knows them best.
"""

OPENINGS = (
    # encyclopedias
    "The town was founded in",
    "She was an American",
    "The battle began when",
    "In biology, a",
    "The album was released in",
    "The river rises in",
    "The species is native to",
    "The church was built in the",
    "The film received",
    "During the war, the",
    "The theory was proposed by",
    "The economy of",
    # stories
    "It was raining when",
    '"I don\'t think so," said',
    "The old man looked at",
    "She opened the letter and",
    "When I was a child, my",
    "The door creaked open, and",
    "They had been walking for hours when",
    "Nobody in the village had",
    # news
    "The government said on",
    "The company announced on Tuesday that",
    "Police are looking for",
    "Researchers have found that",
    "Shares of",
    # the web
    "In this post, I will",
    "Welcome to our",
    "I bought this last month and",
    "If you are looking for",
    "Here are five tips for",
    "Our customers often ask",
    "This recipe is",
    # instructions and learning
    "Question: Why",
    "How do I",
    "First, preheat the oven",
    "Step 1:",
    "The following table",
    "Let x be a",
    "The heart is a",
    "The patient was",
    "According to the law,",
    # nothing in particular
    "The",
    "In",
    "A",
    "I",
    "What",
    "To",
    "1",
)
