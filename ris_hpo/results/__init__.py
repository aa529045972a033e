"""What a user takes from a study: the confirmed winner, exports, replays, a check of the installation."""
