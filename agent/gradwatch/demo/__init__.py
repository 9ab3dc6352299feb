"""`gradwatch demo`: real training jobs, healthy and faulty, and the verdicts that they must get."""
