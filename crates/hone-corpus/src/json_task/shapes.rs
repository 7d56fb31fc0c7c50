//! What the texts of the extraction task are about, how they tell it, and the words in them.
//!
//! People, titles and shops are invented; cities are real only as words. In a list of words every
//! fourth belongs to the test.

/// One thing that a text tells.
#[derive(Debug, Clone, Copy)]
pub(super) struct Field {
    /// The key in the answer, and the hole in the text.
    pub(super) key: &'static str,
    /// Where its values come from.
    pub(super) source: Source,
}

/// Where values come from.
#[derive(Debug, Clone, Copy)]
pub(super) enum Source {
    /// One of a list.
    Words(&'static [&'static str]),
    /// One of either list.
    TwoWords(&'static [&'static str], &'static [&'static str]),
    /// Day and month.
    Date,
    /// A whole number between two bounds, both included.
    Whole(i64, i64),
    /// A price with two decimals.
    Price,
}

/// A kind of text.
#[derive(Debug)]
pub(super) struct Shape {
    /// Its name in data rows.
    pub(super) name: &'static str,
    /// Whether training has it.
    pub(super) in_training: bool,
    /// The four things that it tells.
    pub(super) fields: &'static [Field; 4],
    /// Forms of training, and of the test's known forms.
    pub(super) texts: &'static [&'static str],
    /// Forms that only the test has.
    pub(super) unseen_texts: &'static [&'static str],
}

/// Instructions of training.
pub(super) const INSTRUCTIONS: [&str; 4] = [
    "Extract these fields from the text: {keys}. Reply with one JSON object with exactly these \
     keys in this order and nothing else. Write numbers without quotation marks.\n\nText: {text}",
    "Text: {text}\n\nReply only with a JSON object that has exactly these keys, in this order: \
     {keys}. Numbers are written without quotation marks.",
    "Read the text and return a single JSON object. Keys, in this order: {keys}. Numbers without \
     quotation marks. No other words.\n\n{text}",
    "{text}\n\nGive the following as one JSON object, keys in the order given, numbers without \
     quotation marks, and nothing besides: {keys}.",
];

/// Instructions that only the test has.
pub(super) const INSTRUCTIONS_UNSEEN: [&str; 2] = [
    "Here is a message:\n{text}\n\nTurn it into a JSON object. Use only the keys {keys}, in that \
     order. Numbers must not be in quotation marks. Answer with the JSON object alone.",
    "Your answer must be one JSON object, with the keys {keys} in that order, numbers without \
     quotation marks, and no text around it. Fill it from this: {text}",
];

/// The months of dates.
pub(super) const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

const FIRST: &[&str] = &[
    "Amara",
    "Bertil",
    "Chloe",
    "Dario",
    "Emine",
    "Farid",
    "Gunnar",
    "Hana",
    "Idris",
    "Jolene",
    "Kaito",
    "Lucinda",
    "Mateo",
    "Nkechi",
    "Orla",
    "Pavel",
    "Quentin",
    "Rosalind",
    "Sanjay",
    "Tamsin",
    "Ulrike",
    "Vikram",
    "Wilhelmina",
    "Xavier",
    "Yasmin",
    "Zoltan",
    "Anneke",
    "Benedict",
];
const LAST: &[&str] = &[
    "Abara",
    "Blom",
    "Castillo",
    "Drummond",
    "Eriksen",
    "Fontaine",
    "Gallagher",
    "Hartono",
    "Ibarra",
    "Jankowski",
    "Kimura",
    "Lindqvist",
    "Moreau",
    "Novak",
    "Okafor",
    "Petrov",
    "Quispe",
    "Rossi",
    "Schaefer",
    "Tanaka",
    "Uribe",
    "Vasquez",
    "Whitlock",
    "Yildiz",
];
const CITIES: &[&str] = &[
    "Turin", "Leeds", "Porto", "Graz", "Lyon", "Bergen", "Gdansk", "Aarhus", "Seville", "Dresden",
    "Osaka", "Perth", "Halifax", "Denver", "Cusco", "Mombasa", "Izmir", "Tampere", "Bologna",
    "Antwerp", "Cork", "Malmo", "Nantes", "Brno", "Busan", "Fresno", "Cordoba", "Dundee",
];
const JOBS: &[&str] = &[
    "nurse",
    "architect",
    "baker",
    "bus driver",
    "engineer",
    "librarian",
    "translator",
    "plumber",
    "illustrator",
    "chemist",
    "teacher",
    "optician",
    "gardener",
    "accountant",
    "carpenter",
    "electrician",
];
const ITEMS: &[&str] = &[
    "desk lamps",
    "wool blankets",
    "coffee mugs",
    "garden chairs",
    "notebooks",
    "bicycle bells",
    "tea towels",
    "picture frames",
    "rain jackets",
    "candles",
    "paint brushes",
    "water bottles",
    "cushions",
    "wall clocks",
    "ink cartridges",
    "lunch boxes",
    "flower pots",
    "umbrellas",
    "keyboards",
    "door mats",
];
const EVENT_FIRST: &[&str] = &[
    "Harvest",
    "Riverside",
    "Lantern",
    "Autumn",
    "Winter",
    "Harbour",
    "Castle",
    "Midnight",
    "Orchard",
    "Sunrise",
    "Village",
    "Northern",
];
const EVENT_LAST: &[&str] = &[
    "Concert",
    "Book Fair",
    "Film Night",
    "Chess Open",
    "Fun Run",
    "Craft Market",
    "Food Festival",
    "Poetry Evening",
    "Science Day",
    "Quiz Night",
    "Flower Show",
    "Jazz Weekend",
];
const SKIES: &[&str] = &[
    "light rain",
    "clear skies",
    "thick fog",
    "scattered clouds",
    "heavy snow",
    "thunderstorms",
    "sunshine",
    "drizzle",
    "hail",
    "overcast skies",
    "sleet",
    "freezing rain",
];
const SHOPS: &[&str] = &[
    "Maple Street Books",
    "Corner Hardware",
    "Blue Door Bakery",
    "Old Mill Grocers",
    "Station Flowers",
    "Green Lane Toys",
    "Harbour Bikes",
    "Tall Tree Furniture",
    "Silver Needle Tailors",
    "Hilltop Cheese",
    "North Gate Music",
    "Lucky Penny Antiques",
    "Market Square Shoes",
    "Red Kettle Teas",
    "Paper Moon Stationery",
    "Wild Thyme Garden",
];
const BOOK_FIRST: &[&str] = &[
    "The Silent",
    "A Distant",
    "The Last",
    "An Empty",
    "The Glass",
    "A Borrowed",
    "The Second",
    "A Paper",
    "The Hollow",
    "A Winter",
    "The Iron",
    "The Painted",
];
const BOOK_LAST: &[&str] = &[
    "Orchard",
    "Lighthouse",
    "Garden",
    "Staircase",
    "Harbour",
    "Compass",
    "Window",
    "Violin",
    "Mountain",
    "Letter",
    "Island",
    "Clockmaker",
];

const fn field(key: &'static str, source: Source) -> Field {
    Field { key, source }
}

/// Five shapes of training, and one that only the test has.
pub(super) const SHAPES: [Shape; 6] = [
    Shape {
        name: "person",
        in_training: true,
        fields: &[
            field("name", Source::TwoWords(FIRST, LAST)),
            field("age", Source::Whole(18, 79)),
            field("city", Source::Words(CITIES)),
            field("job", Source::Words(JOBS)),
        ],
        texts: &[
            "{name} is {age} years old, lives in {city} and works as {a job}.",
            "Meet {name} from {city}. At the age of {age}, our guest still enjoys being {a job}.",
            "Our new colleague is {name}, {a job} by trade. Age: {age}. Home: {city}.",
            "In {city} I talked to {a job} called {name}, who turned {age} last week.",
            "After years as {a job} in {city}, {name} says that {age} is a fine age.",
        ],
        unseen_texts: &[
            "The prize goes to {a job}: {name}, aged {age}, of {city}!",
            "{city} is home to {name}. The work is that of {a job}, the birthday cake had {age} \
             candles.",
        ],
    },
    Shape {
        name: "order",
        in_training: true,
        fields: &[
            field("customer", Source::TwoWords(FIRST, LAST)),
            field("item", Source::Words(ITEMS)),
            field("quantity", Source::Whole(2, 48)),
            field("price", Source::Price),
        ],
        texts: &[
            "{customer} ordered {quantity} {item} for {price} euros.",
            "New order: {quantity} {item}, total {price} euros, to be sent to {customer}.",
            "Please send {quantity} {item} to {customer}. The bill comes to {price} euros.",
            "We received {price} euros from {customer} for {quantity} {item}.",
            "{customer} paid {price} euros and is waiting for {quantity} {item}.",
        ],
        unseen_texts: &[
            "The parcel for {customer} holds {quantity} {item}; the receipt says {price} euros.",
            "For {price} euros, {quantity} {item} went to {customer} this morning.",
        ],
    },
    Shape {
        name: "event",
        in_training: true,
        fields: &[
            field("title", Source::TwoWords(EVENT_FIRST, EVENT_LAST)),
            field("date", Source::Date),
            field("city", Source::Words(CITIES)),
            field("seats", Source::Whole(20, 900)),
        ],
        texts: &[
            "The {title} takes place in {city} on {date}. There are {seats} seats.",
            "On {date}, {city} welcomes the {title}, with room for {seats} visitors.",
            "Save the date: {date}, {title}, {city}. Only {seats} seats are on sale.",
            "{seats} people can join the {title} in {city} on {date}.",
            "Tickets for the {title} are here! {city}, {date}, {seats} places.",
        ],
        unseen_texts: &[
            "If you are in {city} on {date}, come to the {title}: {seats} chairs are waiting.",
            "The hall in {city} seats {seats}, and on {date} it hosts the {title}.",
        ],
    },
    Shape {
        name: "weather",
        in_training: true,
        fields: &[
            field("city", Source::Words(CITIES)),
            field("sky", Source::Words(SKIES)),
            field("temperature", Source::Whole(-12, 36)),
            field("wind", Source::Whole(3, 88)),
        ],
        texts: &[
            "{city} has {sky} today, {temperature} degrees, and wind at {wind} km/h.",
            "Expect {sky} in {city}. The wind blows at {wind} km/h and it is \
             {temperature} degrees.",
            "It is {temperature} degrees in {city} with {sky}. Wind: {wind} km/h.",
            "Weather report for {city}: {sky}, temperature {temperature}, wind {wind} km/h.",
            "With {temperature} degrees, {wind} km/h of wind and {sky}, {city} starts the week.",
        ],
        unseen_texts: &[
            "Tonight's forecast says {sky} and gusts of {wind} km/h over {city}; the thermometer \
             shows {temperature}.",
            "At {temperature} degrees and {wind} km/h of wind, people in {city} look up at {sky}.",
        ],
    },
    Shape {
        name: "purchase",
        in_training: true,
        fields: &[
            field("shop", Source::Words(SHOPS)),
            field("date", Source::Date),
            field("amount", Source::Price),
            field("points", Source::Whole(2, 140)),
        ],
        texts: &[
            "On {date} you spent {amount} euros at {shop} and earned {points} points.",
            "Thank you for shopping at {shop}! Date: {date}. Amount: {amount} euros. Points: \
             {points}.",
            "Your card was charged {amount} euros by {shop} on {date}; {points} points were added.",
            "{points} points for you: {shop} booked {amount} euros on {date}.",
            "{shop} sent a receipt for {amount} euros, dated {date}, worth {points} points.",
        ],
        unseen_texts: &[
            "A visit to {shop} on {date} cost {amount} euros but brought {points} points.",
            "Bonus news: {points} points. They come from {shop}, where {amount} euros were paid \
             on {date}.",
        ],
    },
    Shape {
        name: "book",
        in_training: false,
        fields: &[
            field("title", Source::TwoWords(BOOK_FIRST, BOOK_LAST)),
            field("author", Source::TwoWords(FIRST, LAST)),
            field("year", Source::Whole(1890, 2019)),
            field("pages", Source::Whole(90, 780)),
        ],
        texts: &[
            "{author} wrote {title} in {year}. It has {pages} pages.",
            "{title}, a novel of {pages} pages by {author}, came out in {year}.",
            "In {year} {author} published {title}, all {pages} pages of it.",
            "I have just finished {title} by {author}: {pages} pages, first printed in {year}.",
        ],
        unseen_texts: &[],
    },
];
