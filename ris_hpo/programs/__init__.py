"""What a trial trains: the contract, and the programs that come with it."""
