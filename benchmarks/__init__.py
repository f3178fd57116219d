"""What is measured against the papers, peers and limits; never part of the tests, except for one small table."""
