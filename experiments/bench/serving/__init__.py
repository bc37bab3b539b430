"""`expertier bench serve`: the engine under several users, long prompts, second turns, overload and cancels."""
