"""Building blocks of the models: functions where there are no weights, modules where there are."""
