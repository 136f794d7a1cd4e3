"""The words of the generated corpus, by slot. Data only; the grammar says where they may stand."""

ADJECTIVES = (
    "Quiet", "Golden", "Silent", "Broken", "Distant", "Hidden", "Northern", "Paper", "Crimson",
    "Winter", "Hollow", "Velvet", "Lonely", "Painted", "Restless", "Wooden", "Amber", "Burning",
    "Forgotten", "Little",
)  # fmt: skip
NOUNS = (
    "Harbour", "Garden", "River", "Bridge", "Lantern", "Orchard", "Mirror", "Station", "Island",
    "Letter", "Tower", "Window", "Forest", "Clock", "Market", "Shore", "Violin", "Castle",
    "Meadow", "Road",
)  # fmt: skip
NAMES = (
    "Nora", "Harper", "Marco", "Lena", "Otto", "Priya", "Samir", "Greta", "Felix", "Yuki",
    "Clara", "Boris", "Amina", "Hugo", "Ines", "Tom",
)  # fmt: skip
DISHES = (
    "soup", "curry", "pasta", "salad", "fish pie", "bread", "risotto", "cheesecake", "stew",
    "roast chicken",
)  # fmt: skip
PLACES = ("Kitchen", "Diner", "Bistro", "Cafe")
TRADES = (
    "delivery service", "repair service", "cleaning service", "taxi service", "moving service",
    "phone support", "laundry service", "garden service",
)  # fmt: skip
FIRMS = ("Workshop", "Company", "Office")

ASPECTS = {
    "film": ("plot", "acting", "ending", "music", "dialogue", "camera work", "pacing"),
    "book": ("plot", "writing", "ending", "main character", "dialogue", "opening", "pacing"),
    "food": ("taste", "portion", "sauce", "texture", "smell", "seasoning", "presentation"),
    "service": ("staff", "price", "booking", "timing", "communication", "result", "advice"),
}

PRAISING = {
    "film": ("gripping", "moving", "funny", "brilliant", "charming", "superb"),
    "book": ("gripping", "moving", "clever", "brilliant", "charming", "superb"),
    "food": ("delicious", "fresh", "tasty", "perfect", "generous", "superb"),
    "service": ("friendly", "reliable", "quick", "excellent", "flawless", "superb"),
}
COMPLAINING = {
    "film": ("boring", "weak", "predictable", "clumsy", "dreadful", "disappointing"),
    "book": ("boring", "weak", "predictable", "tedious", "dreadful", "disappointing"),
    "food": ("bland", "stale", "greasy", "poor", "dreadful", "disappointing"),
    "service": ("rude", "slow", "careless", "poor", "dreadful", "disappointing"),
}

INTENSIFIERS = ("very", "really", "quite", "truly")
DAYS = ("Monday", "Tuesday", "Friday", "Saturday", "Sunday")
COMPANY = ("my sister", "a friend", "my family", "two colleagues", "my neighbour")
NUMBERS = ("two", "three", "five", "ten", "twenty")
