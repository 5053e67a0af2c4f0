"""Building blocks of whole experiments: models and judges of the text world, and how a run is measured."""
