"""A router for OpenAI servers: which worker answers, and what happens when it does not."""
