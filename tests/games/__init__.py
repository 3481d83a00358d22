"""Other people's environments as scenarios; every test here needs the packages of the extra `games`."""
