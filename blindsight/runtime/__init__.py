"""From a graph of Dynamo's to a call: how a graph is planned, rewritten, compiled and run.

``planner`` looks at a graph once. ``compiled_graph`` is what Dynamo gets for it: at each call
``sequences`` says where the images are (``history`` of a cache, ``forwards`` of the call under
way), ``rewriting`` and ``choose`` say how to run, and the variant of the graph for that is compiled
if it is new. ``watch`` and ``attached`` notice what never got here.
"""
