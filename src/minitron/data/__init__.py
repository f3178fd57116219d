"""Reads documents, tokenises them and packs the tokens into blocks of one length."""
