"""How studies are shown: tables, recommendation, explanations, plots and the HTML page.

Import from the defining modules: a re-export here would load plotly for every user of this package.
"""
