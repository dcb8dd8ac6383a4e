"""Who the experts are: recorder, count tables, heat maps, pictures."""
