"""What documents are compressed with, if nothing else is said; in a file of its own, which imports nothing."""

# Policies that keep the same number of entries in every layer and head, as engines with one block table need.
EQUAL_BLIND_POLICY = "winnow:observe=context:equal=true"  # of texts whose questions are not known
EQUAL_HINTED_POLICY = "winnow:equal=true"
