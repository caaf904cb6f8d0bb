"""Tables, plots and the page: how trials and fronts are shown."""
