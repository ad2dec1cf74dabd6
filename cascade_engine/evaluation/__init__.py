"""How good are the features: retrieval, linear probe, k-NN, mining metrics, and the pages that show them.

Protocols work on arrays (`features`, `neighbours`, `probe`), so that features of any origin can be judged;
`of_run` collects the arrays of a run. Nothing here ever looks at test labels to choose anything.
"""
