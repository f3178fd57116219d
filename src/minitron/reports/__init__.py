"""Writes reports for people: tables, pictures, pages, model cards, the terminal and chats."""
