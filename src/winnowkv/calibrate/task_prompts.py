"""Instructions composed to train the task classifier: families of prompts, grouped by task.

A family counts as one dataset when data is split: models are tested on families that were held out.
An instruction is a pair of texts, put before and after the context; ``{q}`` is replaced by a question.
"""

from __future__ import annotations

Instructions = tuple[tuple[str, str], ...]

LOCALIZATION: dict[str, Instructions] = {
    "document_qa": (
        ("Read the document and then answer the question below.", "Question: {q}\nAnswer:"),
        ("", "Using only the document above, reply to this: {q}"),
        ("Here is a document.", "Now answer briefly, in a few words. {q}"),
        ("Use the following document to respond.", "{q}\nGive just the answer, nothing else."),
        ("I will ask you something about this text.", "{q}"),
    ),
    "story_qa": (
        ("Below is a chapter of a novel, followed by a question about it.", "Question about the novel: {q}\nShort answer:"),
        ("Story:", "With the story in mind, answer with one phrase and no explanation. {q}"),
        ("You will read part of a film script. Afterwards answer a question as briefly as you can.", "Question: {q}\nAnswer:"),
    ),
    "science_qa": (
        (
            "A research paper is given. Answer the question from it; say 'unanswerable' if it is not in the paper.",
            "Question: {q}\nAnswer:",
        ),
        ("Paper:", "From the paper above, answer yes, no or with a short phrase: {q}"),
        ("Consider this scientific article and the question at the end.", "{q} Reply as concisely as possible."),
    ),
    "several_passages": (
        ("Answer the question with the help of these passages.", "Question: {q}\nOnly the answer, please.\nAnswer:"),
        ("The passages below hold the facts you need; combine them.", "{q}\nAnswer with a name, a date or a number only."),
        ("Passages:", "According to the passages, {q}\nAnswer:"),
        ("You get a number of passages. Reply to the question, and do not add other words.", "Question: {q}\nAnswer:"),
    ),
    "needle": (
        ("There is an important fact hidden in the following text. Find it and remember it.", "{q}"),
        ("<text>", "</text>\nWhat was said in the text about this: {q}"),
        (
            "A special number is hidden in the text below. I will quiz you about it.",
            "What is the special number mentioned in the text?",
        ),
        ("<book>", "</book>\nFrom the book, answer: {q}\nAnswer:"),
    ),
    "lookup": (
        (
            "Below is a list of records with keys and values.",
            "Tell me the value that belongs to the key named in this question: {q}",
        ),
        ("Memorise the numbers in these lines.", "What is the number in the line asked for? {q}"),
        ("JSON data:", "Extract the value for the requested key. {q}"),
    ),
    "which_passage": (
        (
            "Several numbered paragraphs follow, then a description of one of them.",
            'Which paragraph does the description match? Give its number, like "Paragraph 7".',
        ),
        (
            "Here are some numbered texts and an abstract. Decide which text the abstract belongs to.",
            "Answer with the number of the text only.\nThe answer is:",
        ),
        ("", "Name the paragraph from which the summary above was written. Reply with 'Paragraph' and its number."),
    ),
    "find_source": (
        (
            "Thirty paragraphs are listed, then a summary of one. Say which paragraph was summarised.",
            'The answer format is "Paragraph 3".\nAnswer:',
        ),
        (
            "Texts with numbers follow.",
            "The following is a short description. Give the number of the text it comes from.\nThe answer is:",
        ),
        ("Determine which of these documents contains the statement at the end.", "Answer with the document's number:"),
    ),
    "key_value": (
        ("The lines below each register a value.", "Tell me the value registered in the line that I name. {q}"),
        ("A table of names and codes:", "Which code stands beside the name? {q}\nCode:"),
        (
            "One of the magic numbers below is asked for later. Memorise them.",
            "What is the magic number that the text mentions?",
        ),
    ),
    "reading_test": (
        ("Read the passage and answer the question that follows.", "{q}\nAnswer:"),
        ("Passage:", "Choose the right answer for this question on the passage: {q}\nA) yes\nB) no\nAnswer:"),
        ("", "After reading the above, {q}"),
    ),
    "wonder": (
        ("", "Having read the text, I wonder: {q}"),
        ("", "{q} The answer is in the text above."),
        ("{q} Look it up in the text below.", ""),
        ("Tell me, from this article: {q}", ""),
    ),
    "extraction": (
        ("Extract the requested detail from the contract.", "Detail: {q}\nExtracted text:"),
        ("", "Copy the exact sentence of the text that answers: {q}"),
        ("Find the span in the passage that answers the question.", "{q}\nSpan:"),
        ("Locate the clause that deals with the following matter.", "{q} Quote it."),
    ),
    "fewshot_qa": (
        (
            "Answer the question from the passage given with it. Some examples come first.",
            "Passage:\nThe mill was sold.\nQuestion:\n{q}\nAnswer:\nin May\n\nPassage:\nIt rained.\nQuestion:\n{q}\nAnswer:",
        ),
        ("Each example has a passage, a question and its answer. Give only the last answer.", "Question: {q}\nAnswer:"),
    ),
    "document_chat": (
        ("You are a helpful assistant with access to this file.", "User: {q}\nAssistant:"),
        ("Context information is below.", "Given the context and no prior knowledge, answer the query.\nQuery: {q}\nAnswer:"),
        ("", "Hi! Quick question on the manual above: {q}"),
    ),
    "code_question": (
        ("Read this source file.", "Which function does what is asked here? {q} Answer with its name."),
        ("", "In the code above, {q}\nAnswer:"),
    ),
    "meeting_fact": (
        ("A conversation is given, then a question about one detail of it.", "{q}\nAnswer with a short phrase:"),
        ("Dialogue:", "Who said so, and when? {q}\nAnswer:"),
    ),
}

AGGREGATION: dict[str, Instructions] = {
    "report_summary": (
        ("You will see a long report. Write a summary of it.", "Write the summary of the report now.\n\nSummary:"),
        ("Summarize the following report in one page.", "Summary:"),
        ("Report:", "Please condense the report above into a few paragraphs."),
        ("", "Give an executive summary of the text above."),
    ),
    "news_summary": (
        ("Several news articles are given. Summarize all of them together.", "Now summarize all the news.\n\nSummary:"),
        ("", "Write a short overview of these articles.\nOverview:"),
        ("News:", "TL;DR:"),
    ),
    "meeting_query": (
        (
            "Here is the transcript of a meeting and a query about it. Respond to the query in some sentences.",
            "Respond to the query about the meeting.\n\nQuery: Summarize what was said about {topic}.\nAnswer:",
        ),
        (
            "Meeting transcript:",
            "Query: What did the group think about {topic} and why?\nAnswer the query on the basis of the whole meeting:",
        ),
        ("Read the minutes of the meeting.", "Summarize the discussion about {topic} and what was decided.\nAnswer:"),
        (
            "Transcript of a meeting, then an instruction.",
            "Instruction: Describe the opinions of the participants on {topic}.\nAnswer in one or more sentences:",
        ),
    ),
    "dialogue_summary": (
        ("Summarize this dialogue briefly.", "Summary:"),
        ("Dialogue:", "What is this conversation about, in two sentences?"),
        ("", "Write the gist of the chat above."),
    ),
    "fewshot_summary": (
        (
            "Write a short summary of each dialogue. Some examples are given first.",
            "Dialogue: Ann: hi\nBob: see you at six\nSummary:",
        ),
        ("Examples of texts with their summaries follow; summarize the last one.", "Text: It rained all week.\nSummary:"),
    ),
    "fewshot_question_types": (
        (
            "Decide what kind of question the last one is. Examples of questions with their types come first.",
            "Question: {q}\nType:",
        ),
        ("Determine the type of the question at the end from these examples of questions.", "Question: {q}\nType:"),
        ("Label the question with its type, as in these examples.", "Question: {q}\nLabel:"),
        ("Questions and the kind of answer each one expects:", "Question: {q}\nKind:"),
    ),
    "fewshot_answer_types": (
        (
            "What does each question ask for: a person, a place, a number or a description? Some examples:",
            "Question: {q}\nType:",
        ),
        (
            "The following are examples of questions and their categories. Give the category of the last question.",
            "Question: {q}\nCategory:",
        ),
        ("Please tell the type of the last question.", "Question: {q}\nType:"),
    ),
    "fewshot_intents": (
        ("Classify the intent.", "Utterance: {q}\nIntent:"),
        ("Which intent does the request have? Examples with their intents:", "Request: {q}\nIntent:"),
        ("Banking requests and their classes:", "Request: {q}\nClass:"),
    ),
    "fewshot_topics": (
        ("Assign a category to the text at the end. Labelled examples:", "Text: {q}\nCategory:"),
        ("News headlines with their topics:", "Headline: {q}\nTopic:"),
        ("Classify each text, as in the examples.", "Text: {q}\nLabel:"),
    ),
    "fewshot_sentiment": (
        ("Examples of sentences and their sentiment:", "Sentence: it was fine\nSentiment:"),
        ("Is the review positive or negative? Examples are given.", "Review: not what I hoped for\nSentiment:"),
        ("Classify the emotion of the message.", "Message: at last!\nEmotion:"),
    ),
    "interview_query": (
        (
            "You get an interview and a query. Answer the query in some sentences.",
            "Query: Summarize the discussion about {topic}.\nAnswer:",
        ),
        ("Hearing transcript:", "Query: What was said about {topic}, and what did the members decide?\nAnswer:"),
        (
            "Below is a transcript and an instruction. Follow the instruction in one or more sentences.",
            "Instruction: Explain what the speakers thought of {topic}.\nAnswer:",
        ),
        ("Transcript:", "Now answer the query from the transcript above. Query: Why did they disagree about {topic}?\nAnswer:"),
    ),
    "committee_query": (
        (
            "The committee met; here is what was said. A query follows.",
            "Query: Summarize the opinions about {topic}.\nAnswer the query in several sentences:",
        ),
        ("Meeting:", "Query: How did the discussion on {topic} develop?\nAnswer:"),
        ("Read the meeting transcript and answer the query about it.", "Query: Summarize the whole meeting.\nAnswer:"),
    ),
    "duplicates": (
        (
            "Certain paragraphs occur more than once below.",
            "After removing the repeated ones, how many paragraphs remain? Give the number only.\nNumber:",
        ),
        (
            "Compare all the paragraphs.",
            "How many unique texts are there once duplicates are removed? Only output a number.\nThe final answer is:",
        ),
    ),
    "counting": (
        (
            "Some of the paragraphs below are repeated. Count how many different paragraphs there are.",
            "Give the final count as a number only.\nCount:",
        ),
        (
            "Read all the items with care.",
            "How many distinct items are there in total? Output only the number.\nThe final answer is:",
        ),
        ("", "How many times does each name occur in the text above? List the totals."),
    ),
    "code_completion": (
        ("Continue the code below.", "Next line:"),
        ("Complete this program.\n", ""),
        ("Write the next line of the following code.\n", "Next line of the code:\n"),
        ("", "# continue the function above\n"),
    ),
    "code_repository": (
        ("Files of a repository are given; complete the last one.", "Next line of code:\n"),
        ("Here is code from several files.\n", "Finish the last function:\n"),
    ),
    "whole_text": (
        ("", "What are the main themes of this text?"),
        ("List the key points of the following text.", "Key points:"),
        ("", "Suggest a title for the text above.\nTitle:"),
        ("Rewrite the text below in plain language.", "Rewritten:"),
        ("Translate the following into French.", "Translation:"),
        ("", "Describe the overall tone of the review above: positive or negative?"),
    ),
    "frequency": (
        ("", "Which words occur most often in the text above?"),
        ("List the most common words of this text.", "Words:"),
    ),
    "word_statistics": (
        ("Below is a list of words; some occur often.", "Which ten words are the most frequent in the list?\nAnswer:"),
        ("Read the coded text and track the frequency of each word.", "What are the three most frequent words?"),
    ),
}

QUESTIONS = (
    "Who founded the company?", "When did the war end?", "What is the capital of the region?", "Where was she born?",
    "How many people attended?", "Which river runs through the town?", "What did the captain give to his brother?",
    "Why did the hero leave the village?", "What is the name of the author's wife?", "In which year was the bridge opened?",
    "Which film was released first?", "What dataset do they use?", "Which baseline is compared with the model?",
    "What is the secret code?", "Who is older, the singer or the actor?", "Is the method supervised?",
    "What position does he hold?",
    "What is the best thing to do in the city?", "Which team won the final?", "What does the witness remember about the car?",
    "What colour was the door?", "Who picked up the parcel?", "How much does a day ticket cost?", "Is breakfast included?",
    "Do I need a permit for this?", "What happens if the payment is late?", "Who is allowed to open the safe?",
    "Which side of the road is the chapel on?", "How long is the guarantee?", "What was her brother's first job?",
    "Are children under twelve admitted free of charge?", "Has the second phase started yet?", "Why was the launch put off?",
    "What does the red light on the panel mean?", "Whom should I call when the boiler leaks?", "How deep is the lake?",
    "Did the author ever visit Lisbon?", "Which of the three drugs worked best?", "What is the maximum load of the lift?",
    "On what grounds did the judge dismiss the case?", "How many samples were used for validation?", "Can the router be reset?",
    "What does section four forbid?", "From which harbour did the ship sail?", "What is Karim allergic to?",
    "Where do visitors leave their coats?", "Who replaced the goalkeeper?", "What percentage of voters stayed at home?",
    "Whose idea was the garden?", "At what temperature does the glue set?", "How did the thief get into the vault?",
    "Which version introduced the flag?", "Was the door locked when they came back?", "What is the plural form?",
    "What did Lena promise her father?", "Is it safe to use the pump in salt water?", "Which port does the server listen on?",
    "What was the weather like on the third day?", "Who are the two witnesses?", "When is the rent due?",
    "What is the learning rate?", "Which gene is involved?", "How far is it from the hut to the summit?",
    "What did the old woman keep in the tin?", "Under what name did he travel?", "Does the policy cover theft abroad?",
    "What should be done before the filter is changed?", "Which country exports the most?", "Why is the bridge closed?",
    "What language do the islanders speak?", "How was the error found?", "Is there a lift in the building?",
)  # fmt: skip
TOPICS = (
    "the budget", "the new remote control", "school funding", "the marketing plan", "the prototype", "childcare policy",
    "the user interface", "data collection", "the timetable", "hiring", "the evaluation", "the energy bill",
)  # fmt: skip
