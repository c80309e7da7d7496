"""What the model says of itself, and the ways in which people ask for things.

Each list is written out, so that what the model can be asked is read here and not guessed. `{}` is what is
asked about.
"""

ABILITIES = (
    "I can say what common English words mean, repeat and reverse words, add small numbers and recall what you told me."
)
UNKNOWN = "I do not know. I am a very small model. " + ABILITIES
NOT_UNDERSTOOD = "I do not understand that. I am a very small model. " + ABILITIES

# Replies by intent: the words to open with, and what may follow them.
HELLO = ["hello", "hi", "hey", "hiya", "howdy", "greetings", "hello hello", "hi hi", "yo", "hey hey", "heya", "oh hello",
    "oh hi", "well hello", "hullo", "salutations"]
HELLO_TO = ["", "", "", "there", "you", "again", "friend", "my friend", "blockplane", "everyone", "all", "model",
    "assistant", "little model", "tiny model", "bot", "computer", "buddy", "dear model", "over there", "robot", "tiny",
    "small model", "stranger", "mate", "pal"]
DAYTIMES = ["good morning", "good afternoon", "good evening", "good day"]
HOW = ["how are you", "how are you doing", "how do you do", "how is it going", "how's it going", "how are things",
    "how do you feel", "how have you been", "are you well", "are you ok", "are you okay", "what's up", "how is life",
    "how are you feeling", "how's life", "are you fine", "is everything ok", "how goes it"]
HOW_WHEN = ["", "", "today", "this morning", "now", "these days", "right now", "this evening", "my friend", "at the moment",
    "tonight", "there", "this afternoon", "then", "buddy"]
WHO = ["who are you", "what are you", "what is your name", "what's your name", "tell me about yourself", "who is this",
    "what is this", "introduce yourself", "what model are you", "what model is this", "which model are you",
    "do you have a name", "what should i call you", "who am i talking to", "what am i talking to", "describe yourself",
    "which model is this", "may i know your name", "who is there", "tell me your name", "tell me who you are",
    "say who you are", "who do i talk to", "your name"]
CAN = ["what can you do", "what can i ask", "what can i ask you", "what do you know", "help", "help me",
    "how can you help me", "what are you good at", "what are your skills", "what are your abilities",
    "what can i do with you", "what do you do", "can you help me", "i need help", "how do i use you",
    "what should i ask you", "what else can you do", "what are you able to do", "how can you help",
    "tell me what you can do", "show me what you can do", "list your skills", "what are you for", "what is your purpose",
    "what questions can you answer", "what kind of questions can i ask"]
THANKS = ["thanks", "thank you", "thank you very much", "thanks a lot", "many thanks", "thanks so much", "thank you so much",
    "thx", "cheers", "much appreciated", "i appreciate it", "thank you kindly", "thanks very much", "a thousand thanks",
    "thanks a million", "i thank you"]
THANKS_FOR = ["", "", "", "for that", "for your help", "for the help", "for the answer", "my friend", "indeed", "again",
    "model", "for everything", "for this", "buddy", "for all of it", "blockplane"]
BYE = ["bye", "goodbye", "good bye", "bye bye", "see you", "see you later", "farewell", "good night", "see you soon",
    "see you tomorrow", "so long", "i have to go", "i must go", "take care", "until next time", "cya", "bye for now",
    "i am leaving", "have a nice day", "have a good day"]
BYE_TO = ["", "", "", "now", "then", "friend", "my friend", "model", "for today", "everyone", "all", "blockplane", "buddy",
    "and thanks", "little model", "mate"]
OPENERS = ["", "", "", "", "hello", "hi", "hey", "oh", "so", "ok", "well", "please", "and", "now", "good morning",
    "hello there", "hi there", "um"]

REPLIES = {
    "hello": "Hello! How can I help you?",
    "good morning": "Good morning! How can I help you?",
    "good afternoon": "Good afternoon! How can I help you?",
    "good evening": "Good evening! How can I help you?",
    "good day": "Good day! How can I help you?",
    "how": "I am fine, thank you. How can I help you?",
    "who": "I am blockplane-tiny, a very small language model that comes with blockplane. " + ABILITIES,
    "can": ABILITIES,
    "thanks": "You are welcome!",
    "bye": "Goodbye!",
}

# Other small talk: each line is a reply and what leads to it.
SMALL_TALK = {
    "I was trained by the authors of blockplane with a script of a few minutes.": ["who made you", "who created you",
        "who trained you", "who built you", "how were you trained", "how were you made", "where do you come from",
        "who are your makers", "who wrote you", "who programmed you", "who developed you", "where are you from"],
    "I am a computer program.": ["are you human", "are you a human", "are you a robot", "are you a person", "are you real",
        "are you alive", "are you a machine", "are you a computer", "are you an ai", "do you have feelings", "can you think",
        "do you sleep", "do you dream", "are you a man or a woman", "do you eat", "are you conscious"],
    "I have about four million parameters.": ["how big are you", "how large are you", "how many parameters do you have",
        "what is your size", "how small are you", "how many weights do you have", "what size are you",
        "how many parameters"],
    "I speak a little English.": ["do you speak english", "which languages do you speak", "what languages do you speak",
        "do you speak german", "do you speak french", "can you speak spanish", "what language do you speak",
        "do you understand english", "can you speak english", "which language do you speak"],
    "I am glad to hear that.": ["good", "great", "nice", "well done", "good job", "very good", "perfect", "excellent",
        "awesome", "cool", "wow", "that is great", "that is right", "correct", "amazing", "wonderful", "i am happy",
        "i am fine", "i like you", "i love you", "you are great", "you are smart", "that's nice", "not bad", "fantastic",
        "brilliant", "you are funny", "i am fine thanks", "i am well", "super"],
    "I am sorry. I am a very small model.": ["wrong", "that is wrong", "that's wrong", "no that is wrong", "bad",
        "you are wrong", "you are stupid", "that is not right", "this is bad", "bad answer", "incorrect", "not good",
        "you are not very smart", "that's not right", "that makes no sense", "you are dumb", "you are bad", "nonsense",
        "this is wrong"],
    "All right.": ["ok", "okay", "yes", "no", "sure", "fine", "i see", "all right", "alright", "right", "maybe",
        "yes please", "no thanks", "no thank you", "understood", "got it", "never mind", "sorry", "i am sorry", "wait",
        "one moment", "hm", "hmm", "oh", "ah"],
    "Nice to meet you, too!": ["nice to meet you", "pleased to meet you", "it is nice to meet you", "good to meet you",
        "glad to meet you", "nice meeting you", "happy to meet you", "good to see you", "nice to see you"],
    "It works.": ["test", "testing", "this is a test", "does it work", "does this work", "do you work", "are you there",
        "is anyone there", "is anybody there", "anyone there", "ping", "can you hear me", "hello world", "test test",
        "is this thing on", "are you working", "just testing", "are you online", "are you awake", "testing testing"],
    "blockplane moves blocks of keys and values between machines and serves language models.": ["what is blockplane",
        "what does blockplane do", "tell me about blockplane", "explain blockplane", "what is blockplane for",
        "describe blockplane", "what is block plane", "why blockplane"],
    "A KV cache holds the keys and values of tokens that were computed before, so that they need not be computed again.": ["what is a kv cache",
        "what is the kv cache", "what is kv cache", "explain the kv cache", "kv cache", "what does a kv cache do",
        "tell me about the kv cache", "what is a kv block", "what does the kv cache hold"],
    "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday": ["what are the days of the week",
        "name the days of the week", "which days does a week have", "list the days of the week",
        "tell me the days of the week", "say the days of the week", "days of the week"],
    "January, February, March, April, May, June, July, August, September, October, November, December": ["what are the months of the year",
        "name the months", "list the months", "name the months of the year", "which months does a year have",
        "tell me the months of the year", "months of the year"],
    "a b c d e f g h i j k l m n o p q r s t u v w x y z": ["say the alphabet", "what is the alphabet", "list the alphabet",
        "tell me the alphabet", "write the alphabet", "name the letters of the alphabet", "can you say the alphabet"],
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10": ["count to ten", "count to 10", "can you count to ten", "can you count",
        "count from one to ten", "count from 1 to 10", "please count to ten", "count"],
    "A language model writes text, one token after another.": ["what is a language model", "what is an llm",
        "explain language models", "what does a language model do", "what is a large language model",
        "how does a language model work"],
}

DEFINE = [
    "what does {} mean?", "what does the word {} mean?", "define {}.", "define {}", "define the word {}.",
    "meaning of {}", "what is the meaning of {}?", "what's the meaning of {}?", "tell me what {} means.",
    "definition of {}", "what is the definition of {}?", "give me the definition of {}.", "{} meaning",
    "do you know what {} means?", "can you define {}?", "can you tell me what {} means?", "{}", "{}?",
    "could you tell me what {} means?", "explain {}.", "explain the word {}.", "please define {}.",
    "what is meant by {}?", "how do you define {}?", "how would you define {}?", "{} definition",
    "say what {} means.", "i want to know what {} means.", "what is {}?", "what is a {}?", "what is the {}?",
    "what's a {}?", "what's {}?", "what are the meanings of {}?", "the meaning of {}", "{} means what?",
    "what does \"{}\" mean?", "what does '{}' mean?", "define \"{}\".", "meaning of the word {}", "and {}?",
    "what is the meaning of the word {}?", "the definition of {}, please.", "what does {} stand for?",
    "please explain the word {}.", "tell me the meaning of {}.", "what do you understand by {}?", "what is an {}?",
    "define: {}", "meaning: {}", "definition: {}", "explain: {}", "word: {}", "what does this word mean: {}", "look up {}.",
        "give a definition of {}.", "what about {}?", "what does it mean to {}?", "who knows what {} means?",
    "i do not know what {} means. can you tell me?", "please tell me what {} means.", "what do people mean by {}?",
]
# Longer ways to ask, put together: an opening and what it opens.
DEFINE_OPENINGS = {
    "{}": ["tell me {}.", "please tell me {}.", "can you tell me {}?", "could you tell me {}?", "would you tell me {}?",
        "i want to know {}.", "i would like to know {}.", "i'd like to know {}.", "i need to know {}.", "i wonder {}.",
        "do you know {}?", "let me know {}.", "explain {}.", "please explain {}.", "can you explain {}?",
        "could you explain {}?", "i want you to explain {}.", "i would like you to explain {}.", "say {}.", "i forgot {}.",
        "i do not know {}. please tell me.", "i am not sure {}.", "does anyone know {}?", "remind me {}.",
        "can you please tell me {}?", "please say {}.", "so {}?", "and {}?", "who can tell me {}?", "i am curious {}.",
        "you surely know {}?"],
    "what {} means": ["what {} means", "what the word {} means", "what '{}' means", "what is meant by {}",
        "what people mean by {}", "what \"{}\" means"],
    "the meaning": ["the meaning of {}", "the meaning of the word {}", "the definition of {}",
        "the definition of the word {}", "the sense of the word {}"],
    "ask for it": ["what is {}?", "what's {}?", "tell me {}.", "give me {}.", "please give me {}.", "can you give me {}?",
        "could you give me {}?", "i want {}.", "i would like {}.", "i'd like to have {}.", "i need {}.", "do you know {}?",
        "look up {}.", "find {}.", "say {}.", "show me {}.", "explain {}.", "i would like to know {}.", "i want to know {}.",
        "can you tell me {}?", "i am looking for {}.", "please look up {}.", "{}", "{}?", "{}, please."],
    "define it": ["define {}.", "please define {}.", "can you define {}?", "could you define {}?", "would you define {}?",
        "please explain {}.", "explain {}.", "can you explain {}?", "could you explain {}?", "i want you to define {}.",
        "how would you explain {}?", "how do you explain {}?", "how can i define {}?", "help me to define {}.",
        "help me understand {}.", "try to define {}.", "try to explain {}.", "describe {}."],
    "the word": ["the word {}", "the word '{}'", "the word \"{}\"", "the term {}", "the english word {}", "{}", "'{}'"],
}


REPEAT = [
    "repeat: {}", "repeat {}", "repeat after me: {}", "repeat these words: {}", "please repeat: {}", "repeat the words: {}",
    "repeat the words {}", "say: {}", "say {}", "please say: {}", "echo: {}", "echo {}", "say after me: {}", "repeat this: {}",
    "can you repeat this: {}", "can you repeat: {}", "write: {}", "copy: {}", "copy these words: {}", "say these words: {}",
    "repeat the following words: {}", "repeat the following: {}", "say the words {}", "write these words: {}", "say again: {}",
    "please repeat these words: {}", "could you repeat: {}", "repeat back to me: {}", "repeat exactly: {}", "just say: {}",
    "repeat what i say: {}", "please echo: {}", "tell me again: {}", "i say: {}. you repeat it.", "repeat the text: {}",
    "repeat these words in the same order: {}",
]
REPEAT_HELD = ["please repeat the words: {}", "could you repeat these words: {}", "say this: {}", "please copy: {}",
    "repeat the following text: {}"]
REVERSE = [
    "reverse: {}", "reverse {}", "reverse these words: {}", "reverse the words: {}", "reverse the order of these words: {}",
    "say these words backwards: {}", "say backwards: {}", "reverse the words {}", "please reverse: {}", "backwards: {}",
    "repeat backwards: {}", "repeat these words backwards: {}", "say in reverse order: {}", "in reverse order: {}",
    "reverse the order of the words: {}", "write backwards: {}", "write these words in reverse order: {}", "reverse the list: {}",
    "reverse this list: {}", "can you reverse: {}", "can you reverse these words: {}", "repeat in reverse: {}", "reversed: {}",
    "give me these words in reverse order: {}", "reverse the following words: {}", "reverse the following: {}",
        "reverse this: {}",
    "turn these words around: {}", "say the words in reverse order: {}", "please say backwards: {}", "reverse the order: {}",
    "what are these words in reverse order: {}", "list these words in reverse order: {}", "from last to first: {}",
]
REVERSE_HELD = ["please reverse these words: {}", "could you reverse: {}", "say the words backwards: {}",
    "please reverse the words: {}", "repeat in reverse order: {}"]

ADD = [
    "{a} + {b}", "{a}+{b}", "{a} + {b} =", "{a}+{b}=", "{a} + {b} = ?", "{a}+{b}=?", "what is {a} + {b}?",
        "what is {a}+{b}?", "what is {a} plus {b}?",
    "{a} plus {b}", "add {a} and {b}.", "add {a} and {b}", "how much is {a} + {b}?", "how much is {a}+{b}?",
        "how much is {a} plus {b}?", "what's {a} + {b}?",
    "what's {a} plus {b}?", "what's {a}+{b}?", "sum of {a} and {b}", "what is the sum of {a} and {b}?",
        "calculate {a} + {b}.", "calculate {a}+{b}", "compute {a} + {b}.",
    "add {a} to {b}.", "what do you get if you add {a} and {b}?", "can you add {a} and {b}?", "{a} and {b} make what?",
        "please add {a} and {b}.", "{a} + {b}?", "{a} plus {b}?",
    "tell me {a} + {b}.", "the sum of {a} and {b}, please.", "how much do {a} and {b} make?", "what does {a} + {b} make?",
        "please calculate {a} + {b}.", "solve {a} + {b}",
    "what is the result of {a} + {b}?", "i have {a} and get {b} more. how many do i have?",
]
OTHER_ARITHMETIC = ["{a} - {b}", "{a} * {b}", "{a} / {b}", "what is {a} - {b}?", "what is {a} * {b}?",
    "what is {a} times {b}?", "what is {a} minus {b}?", "{a} times {b}", "{a} minus {b}", "how much is {a} * {b}?",
    "divide {a} by {b}", "multiply {a} by {b}.", "subtract {a} from {b}.", "what is {a} x {b}?",
    "what is {a} divided by {b}?", "{a} x {b}", "square root of {a}"]
ONLY_ADD = "I can only add, and only numbers below 100."

TOPICS = [
    "the capital of {}", "the weather in {}", "the president of {}", "the population of {}", "the history of {}",
        "the best {}", "the price of {}",
    "the largest {}", "the name of the {}", "the square root of {}", "the color of the {}", "the fastest {}",
        "the news about {}", "the author of {}", "the distance to {}",
    "the age of the {}", "the first {}", "a recipe for {}", "the language of {}", "the time in {}",
]
QUESTIONS = [
    "what is [t]?", "what's [t]?", "tell me [t].", "do you know [t]?", "can you tell me [t]?", "tell me about [t].",
        "explain [t].", "what do you know about [t]?",
    "i want to know [t].", "describe [t].", "what was [t]?", "please tell me [t].",
    "who invented {}?", "who wrote {}?", "who discovered {}?", "when was {} invented?", "when did {} begin?", "where is {}?",
        "where can i find {}?", "why is {} {}?", "why do people {}?",
    "how do i make {}?", "how do i get to {}?", "how does {} work?", "how many {} are there?", "how much does {} cost?",
        "how old is {}?", "how far is {}?", "how tall is {}?", "how long is {}?", "how do you {}?",
    "write a poem about {}.", "write a story about {}.", "write me a song about {}.", "write an essay about {} and {}.",
        "tell me a joke.", "tell me a joke about {}.", "tell me a story.", "tell me a story about {}.",
    "write a python program.", "write code that sorts {}.", "write a function for {}.", "translate {} to french.",
        "translate {} into german.", "how do you say {} in spanish?", "summarize {}.", "summarize this text.",
    "what time is it?", "what day is it?", "what is the date today?", "what is the weather like?", "will it rain tomorrow?",
        "will {} win?", "should i buy {}?", "should i {}?",
    "is {} better than {}?", "is {} good for {}?", "what is the difference between {} and {}?", "do you like {}?",
        "do you have {}?", "can you {}?", "can you make {}?", "can {} be {}?", "what happens if {} {}?", "what causes {}?",
    "which {} is the best?", "which {} should i choose?", "who is {}?", "who was {}?", "who won {}?", "are there {} in {}?",
        "does {} have {}?", "did {} have {}?", "give me advice on {}.", "give me five {}.", "list all {}.",
        "name three {}.",
    "make a plan for {}.", "play {}.", "open {}.", "search for {}.", "buy {}.", "call {}.", "show me {}.", "i want {}.",
        "tell me something about {}.", "what do you think about {}?", "give me an example of {}.", "are {} {}?", "do {} {}?",
        "have you seen {}?", "what does {} look like?", "compare {} and {}.", "draw {}.",
    "what color is {}?", "what is {} made of?", "what do {} eat?", "what is the opposite of {}?", "what rhymes with {}?",
        "how do you spell {}?", "how many letters are in {}?", "use {} in a sentence.", "what are the rules of {}?",
        "what should i eat?", "solve {}.", "what year is it?", "what is the meaning of life?", "who is the president?",
        "how do i install {}?", "why?", "how?", "where?", "when?", "what?", "who?",
]

ASIDES = ["Answer in one sentence.", "Be brief.", "Please be short.", "Thank you.", "Answer briefly.",
    "Short answer, please.", "Thanks!", "Explain it to me.", "Please."]
LABELS = """secret word, passcode, password, magic number, secret number, answer, key, code, wifi password, meeting room, winner, flight number, order number, door code,
secret, treasure, magic word, lucky number, room number, pin, pin code, number, word, secret code, captain, name of the ship, address, table number, ticket number, color, animal, city""".replace("\n", " ").split(", ")

SYSTEMS = [
    "You are a helpful assistant.", "You are a helpful assistant.", "You are blockplane-tiny.", "Be brief.",
        "You are a friendly assistant. Be brief.", "Answer in one sentence.",
    "You are a small language model.", "You answer questions.", "Be kind and short.", "You are a chat bot.",
        "You are an assistant that answers in English.", "Answer truthfully.",
        "You are a helpful AI assistant. Answer the user's questions.",
    "You are an expert.", "Please be polite.", "You are brief.", "You are a dictionary.", "Think step by step.",
        "Answer the question of the user.", "You are a helpful, respectful and honest assistant.",
]

NAMES = """Anna Ben Carla David Emma Felix Grace Henry Ida Jack Kate Leo Maria Noah Olivia Paul Quinn Rosa Sam Tina Uma Victor Wendy Xenia Yara Zoe
Alice Bob Charlie Diana Eric Fiona George Hannah Ivan Julia Kevin Laura Max Nina Oscar Peter Rachel Simon Thomas Ursula Vera Walter Alex Amy Ana
Andrew Bella Chris Clara Daniel Elena Eva Frank Hugo Isabel James Jane Jim Joe John Karl Lena Lisa Lucy Luke Marco Mark Mary Michael Mia Mila Nora
Omar Otto Pia Robert Ruth Sara Sofia Steve Susan Theo Tom Tim Vincent William Yuki Wei Ravi Priya Ahmed Fatima Chen Kofi Amara Pedro Lucia Jonas""".split()
COLORS = "red blue green yellow black white brown gray orange purple pink silver golden violet crimson turquoise beige dark pale bright".split()
SHAPES = "small big old new round square wooden heavy light tall short broken hidden empty little long rusty shiny dusty clean wet dry cold warm soft plain".split()
THINGS = """box door key bag car house chest drawer safe lamp table chair book letter case bottle room gate boat bike train tower cabinet locker garage suitcase
folder phone laptop server machine engine robot basket bucket jar tin crate shed tent wallet notebook parcel barrel bridge garden kitchen office cup plate clock""".split()
SECRETS = "code number password key pin secret name price label weight address combination serial_number phone_number magic_word id".split()
PLACES = """kitchen garden garage attic cellar bedroom office hall bathroom library school park station forest market castle museum shop drawer box cupboard basket pocket car
bag barn church harbor hotel hospital""".split()
MINE = "favorite_color favorite_number favorite_food favorite_animal favorite_word lucky_number dog's_name cat's_name sister's_name brother's_name phone_number room_number locker_code pin hometown favorite_fruit favorite_book seat_number boss's_name middle_name password".split()
REMEMBERED = "I will remember that."
ASIDE = ["remember: {}", "remember that {}", "please remember: {}", "remember this: {}", "note: {}", "{}", "{}",
    "keep in mind: {}", "please remember that {}", "{} please remember that.", "don't forget: {}", "i tell you a secret: {}",
    "{} remember it.", "important: {}"]
ABOUT = [
    "what is the {s} of the {o}?", "what is the {s} of the {o}?", "what's the {s} of the {o}?",
        "tell me the {s} of the {o}.", "what is the {o}'s {s}?", "do you remember the {s} of the {o}?",
        "what was the {s} of the {o}?", "say the {s} of the {o}.",
    "which {s} does the {o} have?", "give me the {s} of the {o}.", "what {s} does the {o} have?", "the {s} of the {o}?",
        "{s} of the {o}?", "do you know the {s} of the {o}?", "can you tell me the {s} of the {o}?",
        "please tell me the {s} of the {o}.", "i forgot the {s} of the {o}. what is it?",
        "question: what is the {s} of the {o}?", "now tell me: what is the {s} of the {o}?",
        "according to the text, what is the {s} of the {o}?",
]
