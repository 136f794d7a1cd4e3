"""The page for raters: chat, thumbs, and what becomes of them."""
